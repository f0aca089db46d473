"""Saving the adapter of a run, whose tensors may be spread over processes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora.files.names import TENSOR_FILE
from gralora.tuner.saving import gathered, plain_name


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """Return what was trained, whole, by its name in the model's state dict; every process must call this."""
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return gathered(model, {name: tensor for name, tensor in model.state_dict().items() if name in trained})


def save_checked(model: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the adapter into `folder`, and compare the file with the tensors.

    Args:
        model: Model with the adapter.
        folder: Folder to write.
        tensors: `trained_tensors` of the model.

    Raises:
        RuntimeError: A tensor is missing or empty, or the file is not what was to be written.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    # Embeddings are never resized here; to find that out, PEFT would ask the hub for the base model.
    model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
    wanted = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    written = load_file(folder / TENSOR_FILE)
    differing = sorted(
        name
        for name in wanted.keys() | written.keys()
        if name not in wanted or name not in written or not _same_bits(wanted[name], written[name])
    )
    if differing or not wanted:
        raise RuntimeError(f"The adapter was not written as it was trained: {', '.join(differing) or 'it is empty'}.")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.cpu().contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
