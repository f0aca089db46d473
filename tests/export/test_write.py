import json

import pytest
import torch
from adapters import edit_tensors, save_adapter

from gralora import to_lora
from gralora.export import write
from gralora.export.convert import LoraOptions
from gralora.export.lora import write_folder
from gralora.export.verify import open_lora
from gralora.files.disk import DiskFullError


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def test_output_that_exists_is_kept_unless_overwritten(folder, tmp_path):
    output = tmp_path / "lora"
    to_lora(folder, output)
    (output / "mine.txt").write_text("kept until then")
    with pytest.raises(ValueError, match=r"`output` must not exist; got .* pass `overwrite=True`"):
        to_lora(folder, output)
    assert (output / "mine.txt").exists()
    to_lora(folder, output, overwrite=True, max_rank=2)
    assert not (output / "mine.txt").exists()
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "lora"]


def test_only_adapters_are_overwritten_and_never_the_input(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(ValueError, match=r"`output` must hold adapter_config.json or .*; '.*photos' does not"):
        to_lora(folder, tmp_path / "photos", overwrite=True)
    for output in (folder, tmp_path):
        with pytest.raises(ValueError, match="`output` must not hold what is read"):
            to_lora(folder, output, overwrite=True)
    assert to_lora(folder, folder / "lora").path == folder / "lora"


def test_a_failing_write_leaves_what_was_there(folder, tmp_path, monkeypatch):
    to_lora(folder, tmp_path / "lora")
    before = (tmp_path / "lora/adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gralora.files.adapter_folder.save_file", full)
    with pytest.raises(DiskFullError, match="The disk is full: "):
        to_lora(folder, tmp_path / "lora", overwrite=True, max_rank=2)
    assert (tmp_path / "lora/adapter_model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "lora"]


def test_a_move_that_fails_puts_the_old_one_back(folder, tmp_path, monkeypatch):
    to_lora(folder, tmp_path / "lora")

    def fail(*args):
        raise OSError("moving failed")

    monkeypatch.setattr("gralora.files.atomic.os.replace", fail)
    with pytest.raises(OSError, match="moving failed"):
        to_lora(folder, tmp_path / "lora", overwrite=True, max_rank=2)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"] == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_too(dtype, folder, tmp_path):
    def write_wrong(adapter, export, hidden):
        write_folder(adapter, export, hidden)
        edit_tensors(hidden, lambda tensors: {key: tensor * 1.02 for key, tensor in tensors.items()})
        return open_lora(hidden)

    with pytest.raises(RuntimeError, match=r"Nothing was exported: .* off by 4\..e-02 of its norm.* in float32"):
        write.write_export(folder, tmp_path / "lora", LoraOptions(dtype=dtype), write_wrong)
    assert not (tmp_path / "lora").exists()
    export = to_lora(folder, tmp_path / "lora", dtype=dtype)
    assert all(0 < layer.measured.relative < torch.finfo(dtype).eps for layer in export.layers)
    assert to_lora(folder, tmp_path / "compressed", dtype=dtype, max_rank=3).rank == 3
