import pytest
import torch
from safetensors.torch import save_file

from gralora.files.tensors import TensorDict, TensorFile

TENSORS = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.arange(5)}


@pytest.fixture(params=["file", "memory"])
def tensors(request, tmp_path):
    if request.param == "memory":
        return TensorDict(
            {key: tensor.clone().requires_grad_(tensor.is_floating_point()) for key, tensor in TENSORS.items()}
        )
    save_file(TENSORS, tmp_path / "tensors.safetensors")
    return TensorFile(tmp_path / "tensors.safetensors")


def test_keys_shapes_dtypes_and_values(tensors):
    assert sorted(tensors.keys()) == ["a", "b", "c"]
    for key, tensor in TENSORS.items():
        assert tensors.shape(key) == tuple(tensor.shape)
        assert torch.equal(tensors.read(key), tensor)
        assert not tensors.read(key).requires_grad
    assert [tensors.dtype(key) for key in "ab"] == [torch.float32, torch.bfloat16]
    assert not isinstance(tensors.dtype("c"), torch.dtype) or tensors.dtype("c") == torch.int64


def test_a_file_that_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="must be a whole safetensors file; it cannot be read"):
        TensorFile(tmp_path / "none.safetensors")
