import pytest
import torch
from adapters import CONFIG, TENSORS, read_config
from safetensors.torch import load_file

from gralora.files.adapter_folder import AdapterFolder


@pytest.fixture
def adapter():
    return AdapterFolder({"peft_type": "GRALORA", "r": 4}, {"a": torch.randn(2, 3)})


def test_both_files_are_written(adapter, tmp_path):
    assert adapter.save(tmp_path / "deep/out") == tmp_path / "deep/out"
    assert sorted(entry.name for entry in (tmp_path / "deep/out").iterdir()) == [CONFIG, TENSORS]
    assert read_config(tmp_path / "deep/out") == adapter.config
    assert torch.equal(load_file(tmp_path / "deep/out" / TENSORS)["a"], adapter.tensors["a"])


def test_another_adapter_is_replaced_only_if_asked(adapter, tmp_path):
    adapter.save(tmp_path / "out")
    adapter.config["r"] = 8
    with pytest.raises(ValueError, match=r"`output` must not exist; .* pass `overwrite=True`"):
        adapter.save(tmp_path / "out")
    assert read_config(tmp_path / "out")["r"] == 4
    adapter.save(tmp_path / "out", overwrite=True)
    assert read_config(tmp_path / "out")["r"] == 8
