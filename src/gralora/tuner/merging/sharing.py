"""Which base weights somebody else in the model holds too: by their bytes in memory, over every path."""

import sys
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gralora.tuner.merging.rows import local


class Sharing(NamedTuple):
    """What of an adapted layer's base others hold."""

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
    """Return for every layer of `layers` what of its base weight other parts of `root` hold.

    Seen are parameters, buffers and tensors that are attributes of any module, whatever they are called and however
    they were tied, what accelerate offloads to the CPU, and what the records of merges keep. What lies elsewhere, in
    another model, a list or a variable, is not seen.
    """
    bases = {id(layer.base_layer): layer for layer in layers}
    called_elsewhere = {
        id(child)
        for module in root.modules()
        for child in module._modules.values()
        if id(child) in bases and module is not bases[id(child)]
    }
    holders = sorted(_holders(root))
    shared = _overlapping(holders) | _same_object(root)
    return {
        layer: Sharing((id(layer.base_layer), "weight") in shared, id(layer.base_layer) in called_elsewhere)
        for layer in layers
    }


def is_alone(layer: Any) -> bool:
    """Return whether nothing in this process but `layer` holds its base or the base's weight. False if in doubt.

    A quick answer, where looking at the whole model for each layer would take long.
    """
    plain = type(layer._modules["base_layer"]._parameters.get("weight")) is nn.Parameter
    return plain and all(found <= alone for found, alone in zip(_references(layer), _ALONE, strict=True))


def _references(layer: Any) -> tuple[int, int, int]:
    """Return how many references there are to the base, to its weight, and to the weight's memory."""
    weight_of = layer._modules["base_layer"]._parameters
    return (
        sys.getrefcount(layer._modules["base_layer"]),
        sys.getrefcount(weight_of["weight"]),
        torch._C._storage_Use_Count(weight_of["weight"].untyped_storage()._cdata),
    )


def own_copy(module: nn.Module) -> nn.Module:
    """Return a module with the same tensors and submodules, whose entries can be changed apart."""
    twin = copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):
            twin.__dict__[name] = value.copy()
    return twin


_example = nn.Module()
_example.base_layer = nn.Linear(1, 1, bias=False)
_ALONE = _references(_example)


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
    """Yield the tensors in CPU memory that accelerate puts into the place of a module's when it is called."""
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
    """Return the owner and name of every holder whose bytes another one holds too; `holders` are sorted."""
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
    """Return the owner and name of every tensor that is held twice: some on meta have no memory to compare."""
    seen: dict[int, list[tuple[int, str]]] = {}
    for owner, name, tensor in _tensors(root):
        seen.setdefault(id(tensor), []).append((owner, name))
    return {place for places in seen.values() if len(places) > 1 for place in places}
