import json

import pytest
from adapters import run
from mixtures import save_mixture_and_adapter


def test_the_command_prints_a_table_json_and_a_picture(adapter_folder, base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = run(capsys, "inspect", adapter_folder, "--base", base_folder, "--plot", tmp_path / "p.png")
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
    code, out, _ = run(capsys, "inspect", tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("model.")}
    assert rows["model.layers.1.mlp.experts.gate_up_proj"][:4] == ["(4", "experts)", "4+2", "2"]
    assert rows["model.layers.1.self_attn.q_proj"][:2] == ["4+2", "2"]
    code, out, _ = run(capsys, "inspect", tmp_path / "adapter", "--json")
    assert [layer["experts"] for layer in json.loads(out)["layers"]] == [4, 4, None] * 2
