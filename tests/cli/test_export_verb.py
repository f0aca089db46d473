from dataclasses import replace
from pathlib import Path

import pytest
from adapters import (
    a_lora,
    adapted,
    bit_of_the_header_flipped,
    config_truncated,
    no_config,
    read_config,
    run,
    save_adapter,
    truncated,
)
from conftest import tiny_llama
from mixtures import save_mixture_and_adapter

from gralora.cli import export
from gralora.export.convert import convert
from gralora.export.formats import FORMATS
from gralora.files.checkpoint import open_adapter


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def test_export_says_what_it_did_and_how_to_serve_it(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "export", folder, tmp_path / "lora", "--base", "org/base", "--name", "mine")
    assert code == 0
    assert "read back: largest difference 0.00e+00, at model.layers." in out
    assert f"vllm serve org/base --enable-lora --lora-modules mine={tmp_path}/lora --max-lora-rank 16" in out
    assert "sglang.launch_server --model-path org/base" in out
    assert "llama-server -m BASE.gguf --lora OUT.gguf" in out
    assert read_config(tmp_path / "lora")["r"] == 16


def test_export_prints_what_compression_costs(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "export", folder, tmp_path / "lora", "--max-rank", 4)
    assert code == 0
    assert sum("rank 16 -> 4  relative error" in line for line in out.splitlines()) == 6
    assert "compressed: relative error" in out


def test_export_says_where_a_rank_is_too_high(tmp_path, capsys):
    model = adapted(lambda: tiny_llama(num_hidden_layers=1), r=264, gralora_k=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    code, out, _ = run(capsys, "export", tmp_path / "adapter", tmp_path / "lora")
    assert code == 0
    assert "vLLM       cannot serve it: rank 528 is above its highest --max-lora-rank, 512" in out
    assert "ways out: --max-rank 512 compresses the adapter; `gralora merge` merges it into the model." in out


def test_export_writes_diffusers_and_peft(folder, tmp_path, capsys):
    assert run(capsys, "export", folder, tmp_path / "d", "--format", "diffusers")[0] == 0
    assert (tmp_path / "d/pytorch_lora_weights.safetensors").is_file()
    assert run(capsys, "export", folder, tmp_path / "p", "--for", "peft", "--dtype", "bfloat16")[0] == 0
    assert read_config(tmp_path / "p")["r"] == 16


@pytest.mark.parametrize("damage", [truncated, bit_of_the_header_flipped, config_truncated, a_lora, no_config])
def test_a_damaged_adapter_ends_with_one_line_and_status_2(damage, folder, tmp_path, capsys):
    damage(folder)
    code, out, err = run(capsys, "export", folder, tmp_path / "lora")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "must be one of lora, gguf, diffusers; got --format 'onnx'."),
        (["--dtype", "int8"], "must be 'float32', 'bfloat16' or 'float16'; got --dtype 'int8'."),
        (["--format", "gguf", "--for", "peft"], "must be serving for gguf; got --for 'peft'."),
        (["--for", "peft"], "must be serving for gguf; got --for 'peft'."),
        (["--format", "lora"], "OUTPUT must not end in .gguf for --format lora, which writes a folder; got '"),
        (["--format", "diffusers"], "OUTPUT must not end in .gguf for --format diffusers"),
        (["--name", "mine"], "--name must not be given for gguf; got --name 'mine'."),
        (["--for", "ollama"], "must be 'serving' or 'peft'; got --for 'ollama'."),
    ],
)
def test_bad_options_end_with_status_2(arguments, message, folder, tmp_path, capsys):
    code, _, err = run(capsys, "export", folder, tmp_path / "out.gguf", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.gguf").exists()


def test_export_says_how_experts_are_declared(tmp_path, capsys):
    save_mixture_and_adapter(tmp_path)
    code, out, _ = run(
        capsys, "export", tmp_path / "adapter", tmp_path / "lora", "--base", "org/base", "--name", "mine"
    )
    assert code == 0
    assert "wrote" in out and "LoRA of rank 10 on 6 weights" in out
    module = f'{{"name": "mine", "path": "{tmp_path}/lora", "is_3d_lora_weight": true}}'
    assert f"--enable-mixed-moe-lora-format --lora-modules '{module}' --max-lora-rank 16" in out
    assert "SGLang     cannot serve it: it leaves out stacked experts; `--experts per-expert` writes" in out
    assert "llama-server -m BASE.gguf --lora OUT.gguf" in out
    code, out, _ = run(capsys, "export", tmp_path / "adapter", tmp_path / "each", "--experts", "per-expert")
    assert code == 0
    assert '"is_3d_lora_weight": false}' in out
    assert "sglang.launch_server" in out
    assert read_config(tmp_path / "each")["target_modules"] == ["q_proj", "w1", "w2", "w3"]


def test_diffusers_files_hold_no_experts(tmp_path, capsys):
    save_mixture_and_adapter(tmp_path)
    export = ("export", tmp_path / "adapter", tmp_path / "out", "--format", "diffusers")
    code, _, err = run(capsys, *export)
    assert code == 2
    assert (
        "cannot be exported to this format: it holds adapters of linear layers, convolutions only; got experts" in err
    )
    code, _, err = run(capsys, *export, "--experts", "stacked")
    assert code == 2
    assert "must not be given for diffusers; got --experts 'stacked'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "OUTPUT must end in .gguf for this format"),
        (["--for", "peft", "--name", "mine"], "--name must not be given for lora --for peft; got --name 'mine'."),
        (["--for", "peft", "--base", "b"], "--base must not be given for lora --for peft; got --base 'b'."),
        (["--format", "diffusers", "--name", "mine"], "--name must not be given for diffusers; got --name 'mine'."),
    ],
)
def test_options_without_effect_on_a_folder_are_refused(arguments, message, folder, tmp_path, capsys):
    code, _, err = run(capsys, "export", folder, tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_name_that_ends_in_gguf_means_gguf(folder, tmp_path, capsys, monkeypatch):
    wanted = []
    entry = FORMATS["gguf"]

    def to_gguf(adapter, output, options, base=None, llama_cpp=None, overwrite=False):
        wanted.append((Path(output).name, base))
        return convert(open_adapter(adapter), options)

    monkeypatch.setitem(FORMATS, "gguf", replace(entry, export=to_gguf))
    code, out, err = run(capsys, "export", folder, tmp_path / "out.gguf", "--base", "org/base")
    assert (code, err) == (0, "")
    assert wanted == [("out.gguf", "org/base")]
    assert "llama-server -m BASE.gguf" in out


def test_the_help_describes_every_format():
    for name, entry in FORMATS.items():
        assert f"{name} ({entry.description})" in export._FORMATS
