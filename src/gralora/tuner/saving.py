"""Saving an adapter whose tensors FSDP or DeepSpeed's ZeRO-3 have sharded."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What FSDP1 and torch's activation checkpointing put into the names of modules, but not into a state dict.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """Return the name of a module as the keys of a state dict have it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def gathered(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` whole, where each process holds a shard; every process must come here then.

    Args:
        model: Model that they are of.
        tensors: Part of its state dict.
    """
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()}
    # ZeRO-3 leaves an empty tensor in a parameter's place, and its shape in the parameter.
    parameters: dict[str, Any] = {
        plain_name(name): p
        for name, p in model.named_parameters()
        if hasattr(p, "ds_shape") and plain_name(name) in whole and whole[plain_name(name)].shape != p.ds_shape
    }
    if parameters:
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            whole |= {name: p.detach().clone() for name, p in parameters.items()}
    return whole


def check_whole(tensors: dict[str, Tensor]) -> None:
    """Refuse to save a shard that `gathered` could not gather.

    Raises:
        RuntimeError: A tensor of another kind, or without elements.
    """
    for key, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            raise RuntimeError(
                f"`save_pretrained` must find whole tensors; got a {type(tensor).__name__} of shape "
                f"{tuple(tensor.shape)} for {key!r}. Save from every process inside FSDP's `summon_full_params` or "
                "DeepSpeed's `GatheredParameters`, or pass `state_dict=accelerator.get_state_dict(model)`."
            )


def check_complete(layers: dict[str, nn.Module], adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Refuse to save an adapter without some of its factors.

    Args:
        layers: Adapted layers by their name in the state dict.
        adapter_name: The adapter that is saved.
        tensors: What was found of it.

    Raises:
        RuntimeError: A factor of a layer is not among `tensors`.
    """
    found = {ending for key in tensors for ending in (key, key.rpartition(".")[0])}
    for name, layer in layers.items():
        for container in ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"):
            key = f"{name}.{container}.{adapter_name}"
            if _holds_tensors(getattr(layer, container), adapter_name) and key not in found:
                raise RuntimeError(
                    f"`save_pretrained` must find every factor of {adapter_name!r}; the state dict has no {key!r}. "
                    "If it is parametrized, call `torch.nn.utils.parametrize.remove_parametrizations` first; if "
                    "you passed a state dict, pass a whole one."
                )


def _holds_tensors(container: Any, adapter_name: str) -> bool:
    """Return whether there are parameters of an adapter; PEFT's own tuner keeps an empty module for no hybrid part."""
    if adapter_name not in container:
        return False
    factor = container[adapter_name]
    return isinstance(factor, Tensor) or any(True for _ in factor.parameters())
