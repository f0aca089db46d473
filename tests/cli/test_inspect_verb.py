import json
import re

import pytest
from adapters import run
from conftest import randomise, tiny_llama
from mixtures import save_mixture_and_adapter

from gralora import GraloraConfig, get_peft_model
from gralora.report import inspect


def test_the_command_prints_a_table_json_and_a_picture(adapter_folder, base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    plot = ("--plot", tmp_path / "p.png")
    code, out, _ = run(capsys, "inspect", adapter_folder, "--base", base_folder, "--all", *plot)
    assert code == 0
    for text in ("model.layers.1.mlp.down_proj", "8+2", "4 weights, 2,880 parameters", "served on: PEFT", "wrote"):
        assert text in out
    assert (tmp_path / "p.png").is_file()
    code, out, _ = run(capsys, "inspect", adapter_folder, "--json")
    written = json.loads(out)
    assert code == 0
    assert written["layers"][0]["target"] == "model.layers.0.mlp.down_proj"
    assert written["lora_rank"] == 18
    assert "vLLM" in written["served_on"]


def table_of(out):
    """The cells of the printed table, by the name of the row."""
    lines = out.partition("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.fixture
def deep_folder(tmp_path):
    """An adapter of twelve layers whose ranks differ, and its base."""
    base = tiny_llama(num_hidden_layers=12)
    base.save_pretrained(tmp_path / "base")
    config = GraloraConfig(
        r=8, target_modules=["q_proj", "gate_proj"], rank_pattern={r"layers\.1\..*q_proj": 4}, alpha=8
    )
    model = randomise(get_peft_model(base, config))
    with pytest.warns(UserWarning, match="This adapter uses `rank_pattern`"):
        model.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_layers_are_grouped_by_the_kind_of_module(deep_folder, capsys):
    code, out, _ = run(capsys, "inspect", deep_folder)
    report = inspect(deep_folder)
    norms = [layer.norm for layer in report.layers if layer.target.endswith("gate_proj")]
    rows = table_of(out)
    assert code == 0
    assert list(rows) == ["gate_proj", "q_proj"]
    assert rows["gate_proj"][:3] == ["12", "8", "2"]
    assert rows["gate_proj"][4] == f"{min(norms):#.2g}–{max(norms):#.2g}"  # noqa: RUF001
    assert rows["q_proj"][1] == "4–8"  # noqa: RUF001
    assert rows["q_proj"][-2:] == ["8–16", "8–16"]  # noqa: RUF001
    assert "/‖W‖" not in out


@pytest.mark.parametrize("arguments", [[], ["--all"], ["--base", "{base}"], ["--all", "--base", "{base}"]])
def test_the_report_fits_80_columns(arguments, deep_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    base = deep_folder.parent / "base"
    _, out, _ = run(capsys, "inspect", deep_folder, *[argument.format(base=base) for argument in arguments])
    assert max(map(len, out.splitlines())) <= 80
    if "--all" in arguments:
        names = list(table_of(out))
        assert len(set(names)) == 24
        assert all(re.search(rf"\b{i}\b.*q_proj$", names[2 * i + 1]) for i in range(12))


def test_a_damaged_adapter_ends_with_one_line_and_status_2(adapter_folder, capsys):
    (adapter_folder / "adapter_model.safetensors").write_bytes(b"not an adapter")
    code, out, err = run(capsys, "inspect", adapter_folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--layer", "model.layers.0.mlp.down_proj"], ["--overwrite"]])
def test_options_of_the_picture_without_one_are_refused(arguments, adapter_folder, capsys):
    assert run(capsys, "inspect", adapter_folder, *arguments) == (
        2,
        "",
        f"error: {arguments[0]} must come with --plot.\n",
    )


def test_experts_are_counted_beside_their_name(tmp_path, capsys, monkeypatch):
    save_mixture_and_adapter(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = run(capsys, "inspect", tmp_path / "adapter", "--base", tmp_path / "base", "--all")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("model.")}
    assert rows["model.layers.1.mlp.experts.gate_up_proj"][:4] == ["(4", "experts)", "4+2", "2"]
    assert rows["model.layers.1.self_attn.q_proj"][:2] == ["4+2", "2"]
    code, out, _ = run(capsys, "inspect", tmp_path / "adapter", "--json")
    assert [layer["experts"] for layer in json.loads(out)["layers"]] == [4, 4, None] * 2
