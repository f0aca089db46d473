"""The tensors of an adapter that is saved, whole also where FSDP or DeepSpeed's ZeRO-3 have sharded them."""

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gralora.tuner.factor import TiedFactor
from gralora.tuner.layer import GraloraLayer

# What FSDP1 and torch's activation checkpointing put into the names of modules, but not into a state dict.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def adapter_tensors(model: nn.Module, bias: str, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one adapter and the biases trained with it, whole.

    Where processes hold shards, every process must call this.

    Args:
        model: Model with the adapter, which PEFT's own tuner may have put on before ours was registered.
        bias: What the config says: "none", "all" or "gralora_only".
        adapter_name: Name of the adapter.
        state_dict: State dict of the model; empty in a process that saves nothing.

    Raises:
        RuntimeError: A tensor is not whole, or missing.
    """
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "gralora_A")
    }
    containers = {f"{layer}.{container}" for layer in layers for container in GraloraLayer.adapter_layer_names}

    def is_adapters(key: str) -> bool:
        if key == "bias" or key.endswith(".bias"):
            of_layer = key.removesuffix(".base_layer.bias") in layers
            return bias == "all" or (bias == "gralora_only" and of_layer)
        # `….gralora_A.<adapter>.weight`; of PEFT's own tuner without the last part
        return key.rsplit(".", 2)[0] in containers or key.rsplit(".", 1)[0] in containers

    tensors = gathered(model, {key: tensor for key, tensor in state_dict.items() if is_adapters(key)})
    saves = any(".gralora_" in key for key in state_dict)  # a process that saves nothing passes an empty one
    if refusal := shard_refusal(tensors) or (missing_refusal(layers, adapter_name, tensors) if saves else None):
        raise RuntimeError(refusal)
    return tensors


def extra_tensors(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return, unsharded, what PEFT saves beside the adapter: `modules_to_save`, trainable tokens and embeddings."""
    beside = _embeddings(model)
    others = tuple(
        f"{plain_name(name)}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or any(module is embedding for embedding in beside)
    )
    return gathered(model, {key: tensor for key, tensor in state_dict.items() if key.startswith(others)})


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input and output embeddings; a model may have none."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter, lambda: None)())
        except NotImplementedError:  # transformers raises this for some vision models
            continue
    return [module for module in found if module is not None]


def adapted_embeddings(model: nn.Module, adapter_name: str) -> list[GraloraLayer]:
    """Return the input and output embeddings that have this adapter."""
    found = [layer for layer in _embeddings(model) if isinstance(layer, GraloraLayer)]
    return [layer for layer in found if layer.has_adapter(adapter_name)]


def embeddings_changed(model: Any, adapter_name: str) -> bool:
    """Return whether base weights of adapted embeddings differ from the base model's.

    They do where they are trained, or where the vocabulary has another size than the base model's config says.
    """
    for layer in adapted_embeddings(model, adapter_name):
        weight = layer.weight_ref().parameter
        if weight is not None and weight.requires_grad:
            return True
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    base = model.peft_config[adapter_name].base_model_name_or_path
    if not size or not base:
        return False
    try:
        return type(model.config).from_pretrained(base).vocab_size != size
    except OSError:
        warnings.warn(
            f"The config of {base!r} cannot be read, so it is not known whether the vocabulary was resized. The base "
            "weights of its embeddings are not saved; pass `save_embedding_layers=True` to save them.",
            stacklevel=4,
        )
        return False


def plain_name(name: str) -> str:
    """Return the name of a module as the keys of a state dict have it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def gathered(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` whole; where each process holds a shard, every process must call this.

    Args:
        model: Model with the tensors.
        tensors: Part of the model's state dict.
    """
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()}
    # ZeRO-3 leaves an empty tensor in a parameter's place, and its shape in the parameter.
    named: list[tuple[str, Any]] = list(model.named_parameters())
    parameters = {
        plain_name(name): p
        for name, p in named
        if hasattr(p, "ds_shape") and plain_name(name) in whole and whole[plain_name(name)].shape != p.ds_shape
    }
    if parameters:
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            whole |= {name: p.detach().clone() for name, p in parameters.items()}
    return whole


def shard_refusal(tensors: dict[str, Tensor]) -> str | None:
    """Return why tensors cannot be saved that `gathered` could not gather, or None where all are whole."""
    for key, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            return (
                f"`save_pretrained` must find whole tensors; got a {type(tensor).__name__} of shape "
                f"{tuple(tensor.shape)} for {key!r}. Save from every process inside FSDP's `summon_full_params` or "
                "DeepSpeed's `GatheredParameters`, or pass `state_dict=accelerator.get_state_dict(model)`."
            )
    return None


def missing_refusal(layers: dict[str, nn.Module], adapter_name: str, tensors: dict[str, Tensor]) -> str | None:
    """Return which factor of an adapter is missing, or None.

    Args:
        layers: Adapted layers by their name in the state dict.
        adapter_name: Name of the adapter that is saved.
        tensors: What was found of it.
    """
    found = {ending for key in tensors for ending in (key, key.rpartition(".")[0])}
    for name, layer in layers.items():
        for container in GraloraLayer.adapter_layer_names:
            key = f"{name}.{container}.{adapter_name}"
            if _holds_tensors(getattr(layer, container), adapter_name) and key not in found:
                return (
                    f"`save_pretrained` must find every factor of {adapter_name!r}; the state dict has no {key!r}. "
                    "If it is parametrized, call `torch.nn.utils.parametrize.remove_parametrizations` first; if "
                    "you passed a state dict, pass a whole one."
                )
    return None


def _holds_tensors(container: Any, adapter_name: str) -> bool:
    """Return whether there are parameters of an adapter; PEFT's own tuner keeps an empty module for no hybrid part."""
    if adapter_name not in container:
        return False
    if isinstance(getattr(container, "_modules", {}).get(adapter_name), TiedFactor):
        return False
    factor = container[adapter_name]
    return isinstance(factor, Tensor) or any(True for _ in factor.parameters())
