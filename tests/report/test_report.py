import json
import math

import oracle
import pytest
import torch
from conftest import randomise, tiny_gpt2, tiny_llama
from safetensors.torch import load_file

from gralora import GraloraConfig, get_peft_model
from gralora.files.checkpoint import open_adapter
from gralora.report import inspect
from gralora.report.inspect import block_norms
from gralora.report.plot import plot
from gralora.tuner.blocks import Factors

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path):
    config = GraloraConfig(r=8, hybrid_r=2, gralora_k=2, alpha=20, target_modules=TARGETS)
    model = randomise(get_peft_model(tiny_llama(), config))
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_the_numbers_are_those_of_the_dense_update(folder, base):
    report = inspect(folder, base)
    adapter, weights = open_adapter(folder), load_file(base / "model.safetensors")
    assert [entry.target for entry in report.layers] == list(adapter.layers)
    for entry in report.layers:
        dense = oracle.dense(*adapter.factors(entry.target), 2.0)
        weight = weights[f"{entry.target}.weight"].double()
        s = torch.linalg.svdvals(dense)
        shares = s[s > 1e-12] / s.sum()
        assert (entry.r, entry.hybrid_r, entry.k, entry.scale, entry.lora_rank) == (8, 2, 2, 2.0, 18)
        assert entry.norm == pytest.approx(float(dense.norm()))
        assert entry.relative_norm == pytest.approx(float(dense.norm() / weight.norm()))
        assert entry.needed_rank == torch.linalg.matrix_rank(dense) == 18
        assert entry.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())))
    assert report.norm == pytest.approx(math.sqrt(sum(entry.norm**2 for entry in report.layers)))
    stored = load_file(folder / "adapter_model.safetensors")
    assert report.parameters == sum(tensor.numel() for tensor in stored.values())
    assert report.bytes == sum(
        (folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert (report.base_model, report.lora_rank, report.vllm_max_lora_rank) == ("someone/base", 18, 32)
    assert "vLLM (--max-lora-rank 32)" in report.served_on


def test_without_a_base_there_is_no_relative_norm(folder):
    assert all(entry.relative_norm is None for entry in inspect(folder).layers)


def test_the_base_is_found_under_its_own_names_and_transposed(tmp_path):
    gpt2 = tiny_gpt2()
    weight = gpt2.transformer.h[0].attn.c_attn.weight.detach().double()
    gpt2.transformer.save_pretrained(tmp_path / "base")
    config = GraloraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    randomise(get_peft_model(gpt2, config)).save_pretrained(tmp_path / "adapter")
    first = inspect(tmp_path / "adapter", tmp_path / "base").layers[0]
    assert first.relative_norm == pytest.approx(first.norm / float(weight.norm()))


def test_a_sharded_base_is_read_and_another_model_is_not_mistaken(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").is_file()
    assert all(entry.relative_norm for entry in inspect(folder, tmp_path / "sharded").layers)
    tiny_llama(hidden_size=16, intermediate_size=20).save_pretrained(tmp_path / "other")
    assert not any(entry.relative_norm for entry in inspect(folder, tmp_path / "other").layers)


def test_a_base_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`base` must be the folder of a model; .* has no model.safetensors"):
        inspect(folder, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the index of a model; it can't be read"):
        inspect(folder, tmp_path)


def test_block_norms_are_those_of_the_blocks():
    f = Factors(torch.randn(3, 4, 6), torch.randn(3, 6, 5))
    dense = oracle.dense(*f, 0.5)
    norms = block_norms(f, 0.5)
    for i in range(3):
        for j in range(3):
            block = dense[5 * i : 5 * i + 5, 4 * j : 4 * j + 4]
            assert float(norms[i, j]) == pytest.approx(float(block.norm()))


def test_what_it_can_be_served_on(tmp_path):
    config = GraloraConfig(r=8, target_modules=TARGETS, modules_to_save=["lm_head"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "more")
    report = inspect(tmp_path / "more")
    assert report.also_trained == ("base_model.model.lm_head.weight",)
    assert "LoRA engines take it merged: `gralora merge`" in report.served_on
    get_peft_model(tiny_llama(num_hidden_layers=1), GraloraConfig(r=512, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "high"
    )
    report = inspect(tmp_path / "high")
    assert (report.lora_rank, report.vllm_max_lora_rank) == (1024, None)
    assert report.layers[0].needed_rank == 0
    assert "vLLM with --max-rank 512 or lower, or merged" in report.served_on


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(folder, base, tmp_path, suffix):
    report = inspect(folder, base)
    plot(report, tmp_path / f"out{suffix}", layer="model.layers.1.mlp.down_proj")
    head = (tmp_path / f"out{suffix}").read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in head
    with pytest.raises(ValueError, match="`output` must not exist"):
        plot(report, tmp_path / f"out{suffix}")
    with pytest.raises(ValueError, match=r"`plot` must end in \.png or \.svg"):
        plot(report, tmp_path / "out.pdf")
    with pytest.raises(ValueError, match=r"`layer` must be an adapted one; got layer='nowhere'. The first is 'model"):
        plot(report, tmp_path / "new.png", layer="nowhere")
    assert not (tmp_path / "new.png").exists()


def run(capsys, *arguments):
    from gralora.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_the_command_prints_a_table_json_and_a_picture(folder, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = run(capsys, "inspect", folder, "--base", base, "--plot", tmp_path / "p.png")
    assert code == 0
    for text in ("model.layers.1.mlp.down_proj", "8+2", "4 modules, 2,880 parameters", "served on: PEFT", "wrote"):
        assert text in out
    assert (tmp_path / "p.png").is_file()
    code, out, _ = run(capsys, "inspect", folder, "--json")
    written = json.loads(out)
    assert code == 0
    assert written["layers"][0]["target"] == "model.layers.0.mlp.down_proj"
    assert written["lora_rank"] == 18
    assert "vLLM" in written["served_on"]


def test_a_damaged_adapter_ends_with_one_line_and_status_2(folder, capsys):
    (folder / "adapter_model.safetensors").write_bytes(b"not an adapter")
    code, out, err = run(capsys, "inspect", folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
