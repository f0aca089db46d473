import pytest
import torch
from adapters import save_adapter
from safetensors.torch import load_file

from gralora import to_lora
from gralora.files.adapter_folder import AdapterFolder


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def test_the_dtype_is_cast_and_what_it_costs_is_measured(folder, tmp_path):
    export = to_lora(folder, tmp_path / "lora", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "lora/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert 1e-4 < max(layer.measured.relative for layer in export.layers) < 1e-2


def test_a_wrong_file_would_be_noticed(folder, tmp_path, monkeypatch):
    write = AdapterFolder.write

    def swap(self, path):
        key = next(key for key in self.tensors if "lora_B" in key)
        self.tensors[key] = self.tensors[key].flip(0).contiguous()
        write(self, path)

    monkeypatch.setattr(AdapterFolder, "write", swap)
    with pytest.raises(RuntimeError, match="Nothing was exported: what was read back gives another update at 'model"):
        to_lora(folder, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
