"""Detection of base weights that other parts of the model hold too, by their bytes in memory."""

import sys
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gralora.tuner.merging.rows import local


class Sharing(NamedTuple):
    """What other parts of the model hold of an adapted layer's base."""

    weight: bool = False  # its memory, whole or in part
    module: bool = False  # the module itself

    def __bool__(self) -> bool:
        return self.weight or self.module


UNSHARED = Sharing()


class _Holder(NamedTuple):
    start: int
    stop: int
    device: str
    owner: int
    name: str


def sharing_in(root: nn.Module, layers: list[nn.Module]) -> dict[nn.Module, Sharing]:
    """Return for every layer of `layers` what other parts of `root` hold of its base weight.

    The search covers parameters, buffers and tensor attributes of all modules, whatever their names and however they
    were tied, weights that accelerate offloads to the CPU, and weights kept in the records of merges. It does not
    cover other models, lists and variables.
    """
    bases = {id(layer.base_layer): layer for layer in layers}
    weights = {layer: layer.weight_ref() for layer in layers}
    called_elsewhere = {
        id(child)
        for module in root.modules()
        for child in module._modules.values()
        if id(child) in bases and module is not bases[id(child)]
    }
    holders = sorted(_holders(root))
    shared = _overlapping(holders) | _same_object(root)
    return {
        layer: Sharing((id(ref.owner), ref.name) in shared, id(layer.base_layer) in called_elsewhere)
        for layer, ref in weights.items()
    }


def is_alone(layer: Any) -> bool:
    """Return whether nothing in this process but `layer` holds its base or the base's weight; False if in doubt.

    Quick, where searching the whole model for each layer would take long.
    """
    in_base, name = _whether_in_base_and_name(layer)
    plain = in_base and type(layer._modules["base_layer"]._parameters.get(name)) is nn.Parameter
    return plain and all(found <= alone for found, alone in zip(_references(layer, name), _ALONE, strict=True))


def _whether_in_base_and_name(layer: Any) -> tuple[bool, str]:
    # A function of its own, so that no reference to the base is left when references are counted.
    ref = layer.weight_ref()
    return ref.owner is layer._modules["base_layer"], ref.name


def _references(layer: Any, name: str) -> tuple[int, int, int]:
    """Return how many references there are to the base, to its weight, and to the weight's memory."""
    weight_of = layer._modules["base_layer"]._parameters
    return (
        sys.getrefcount(layer._modules["base_layer"]),
        sys.getrefcount(weight_of[name]),
        torch._C._storage_Use_Count(weight_of[name].untyped_storage()._cdata),
    )


def own_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module, whose entries can be changed without changing the original."""
    twin = copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):
            twin.__dict__[name] = value.copy()
    return twin


# Counted once, on a layer that nothing else knows: the number depends on the versions of Python and torch.
_example = nn.Module()
_example.base_layer = nn.Linear(1, 1, bias=False)
_ALONE = _references(_example, "weight")


def _tensors(root: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
    for module in root.modules():
        for entries in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in entries.items():
                # FSDP1's flat parameter is the very memory that the weights are views of.
                if isinstance(tensor, Tensor) and not getattr(tensor, "_is_flat_param", False):
                    yield id(module), name, tensor
        for name, tensor in _offloaded(module):
            yield id(module), name, tensor
        for number, record in enumerate(getattr(module, "_merges", ())):
            original = getattr(getattr(record, "original", None), "parameter", None)
            if original is not None:
                yield id(record), str(number), original


def _offloaded(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in CPU memory that accelerate loads into a module when it is called."""
    weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    prefix = getattr(weights, "prefix", "")
    weights = getattr(weights, "dataset", weights)
    in_memory: Any = weights if isinstance(weights, dict) else getattr(weights, "state_dict", None) or {}
    for name in module._parameters:
        if isinstance(tensor := in_memory.get(prefix + name), Tensor):
            yield name, tensor


def _holders(root: nn.Module) -> Iterator[_Holder]:
    for owner, name, tensor in _tensors(root):
        try:
            here = local(tensor)
            start, itemsize = here.data_ptr(), here.itemsize
            last = sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
        except (RuntimeError, NotImplementedError):  # packed, sparse or fake: no memory of its own
            continue
        if start and here.numel():
            yield _Holder(start, start + (last + 1) * itemsize, str(here.device), owner, name)


def _overlapping(holders: list[_Holder]) -> set[tuple[int, str]]:
    """Return the owner and name of every holder whose bytes another one holds too; `holders` must be sorted."""
    shared: set[tuple[int, str]] = set()
    furthest: dict[str, _Holder] = {}
    for holder in holders:
        before = furthest.get(holder.device)
        if before is not None and holder.start < before.stop:
            shared |= {(before.owner, before.name), (holder.owner, holder.name)}
        if before is None or holder.stop > before.stop:
            furthest[holder.device] = holder
    return shared


def _same_object(root: nn.Module) -> set[tuple[int, str]]:
    """Return the owner and name of every tensor object that is held twice; on meta there is no memory to compare."""
    seen: dict[int, list[tuple[int, str]]] = {}
    for owner, name, tensor in _tensors(root):
        seen.setdefault(id(tensor), []).append((owner, name))
    return {place for places in seen.values() if len(places) > 1 for place in places}
