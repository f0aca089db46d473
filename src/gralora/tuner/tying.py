"""Adapters of modules whose weights are tied (`ensure_weight_tying`): one set of parameters, which all of them read.

The input embedding has the adapter. What is tied to it, such as the output layer, holds `TiedFactor`s, which return
the tensors of that adapter, transposed where the module reads the weight the other way round.
"""

import re
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from gralora.tuner.config import GraloraConfig
from gralora.tuner.factor import TiedFactor
from gralora.tuner.kinds import kind_for
from gralora.tuner.layer import GraloraLayer, gralora_layers
from gralora.tuner.targets import Places, Target, matches


def tie_targets(
    model: Any, places: Places, config: GraloraConfig, found: list[Target], tied_names: list[str]
) -> tuple[list[Target], Target | None]:
    """Return the targets, those tied to the input embedding marked so, and the target of the input embedding.

    Where the input embedding or a module that is tied to it is among `found`, all of them are among what is returned,
    and `config` then names the input embedding.

    Args:
        model: Model that the adapter is put on.
        places: All places of its modules.
        config: Config of the adapter.
        found: Targets without ties.
        tied_names: Names of modules that share the weight of the input embedding, as far as PEFT knows.

    Returns:
        Targets, and the input embedding's; `found` itself and None where nothing is to be tied.

    Raises:
        ValueError: A tied module is excluded or has other widths.
    """
    embedding = input_embedding(model)
    if embedding is None:
        return found, None
    source = _target(embedding, places)
    tied = [_target(module, places) for module in _tied_modules(model, places, source, tied_names)]
    if not tied or not any(target.module in (source.module, *(t.module for t in tied)) for target in found):
        return found, None
    for target in tied:
        target.tied = True
        _check(target, source)
    for target in (source, *tied):
        if isinstance(matches(config, [name for name, _ in target.places]), _ExcludedModule):
            raise ValueError(
                f"`ensure_weight_tying` must adapt all modules that share one weight; {target.name!r} is among them, "
                "and `exclude_modules` leaves it out."
            )
    _name_in(config, source, found)
    together = [source, *tied]
    return [t for t in found if all(t.module is not other.module for other in together)] + together, source


def input_embedding(model: Any) -> nn.Module | None:
    """Return the input embedding of `model`, which may be a layer of ours, or None."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers raises the second for some vision models
        return None


def tie(layer: GraloraLayer, source: GraloraLayer, adapter_name: str, dropout: float) -> None:
    """Give `layer` the adapter of `source`, whose tensors and numbers it shares; dropout is its own."""
    turned = layer.weight_ref().matrix is not source.weight_ref().matrix
    names = (
        ("gralora_B", "gralora_A", "gralora_B_general", "gralora_A_general") if turned else layer.adapter_layer_names
    )
    for container, name in zip(layer._containers(), names, strict=True):
        holder = getattr(source, name)._modules.get(adapter_name)
        if holder is not None:
            container[adapter_name] = TiedFactor(holder, source, name, turned)
    for name in ("r", "hybrid_r", "alpha", "gralora_k", "scaling", "initial_scaling"):
        getattr(layer, name)[adapter_name] = getattr(source, name)[adapter_name]
    layer.gralora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
    layer.pads_outputs |= layer.factors(adapter_name).out_features > layer.out_features


def record(layers: dict[str, GraloraLayer], layer: GraloraLayer, adapter_name: str) -> dict[str, Any] | None:
    """Return what an adapter's config keeps of a tied layer, which has no tensors in the file; None where not tied."""
    holder = layer.gralora_A._modules.get(adapter_name)
    if not isinstance(holder, TiedFactor):
        return None
    return {"kind": "tied", "to": next(name for name, other in layers.items() if other is holder.layer)}


def tie_modules_to_save(model: nn.Module, config: Any, tied_names: list[str]) -> bool:
    """Make PEFT train the input embedding whole, and what is tied to it with it, if `modules_to_save` names any.

    PEFT reads `modules_to_tie` of the config.
    """
    embedding = input_embedding(model)
    own_names = [name for name, module in model.named_modules() if module is embedding]
    asked = config.modules_to_save or []

    def meant(module: str, names: list[str]) -> bool:
        return any(f".{name}".endswith(f".{module}") for name in names)

    if not tied_names or not any(meant(module, [*own_names, *tied_names]) for module in asked):
        return bool(config.trainable_token_indices)  # those PEFT ties itself
    others = [module for module in asked if not meant(module, [*own_names, *tied_names])]
    config.modules_to_save, config.modules_to_tie = [*others, own_names[0]], set(tied_names)
    return True


def leaders(layers: dict[str, GraloraLayer], adapter_names: list[str] | None) -> dict[GraloraLayer, GraloraLayer]:
    """Return for each layer that is to merge adapters of another layer into the weight of both, that other layer."""
    found: dict[GraloraLayer, GraloraLayer] = {}
    for layer in layers.values():
        names = layer.names_to_merge(adapter_names)
        holders = [layer.gralora_A._modules[name] for name in names]
        others = {holder.layer if isinstance(holder, TiedFactor) else None for holder in holders}
        other = others.pop() if len(others) == 1 else None
        if (
            other is not None
            and other.weight_ref().parameter is layer.weight_ref().parameter
            and all(other.scaling[name] == layer.scaling[name] for name in names)
        ):
            found[layer] = other
    return found


def _target(module: nn.Module, places: Places) -> Target:
    base = module.get_base_layer() if isinstance(module, GraloraLayer) else module
    return Target(module, places.of(module), None, kind_for(base, None))


def _tied_modules(model: nn.Module, places: Places, source: Target, tied_names: list[str]) -> list[nn.Module]:
    """Return the modules whose weight is that of `source`, found by the weight itself or by their names."""
    weight = source.base._parameters.get("weight")
    found = []
    inside = {id(inner) for layer in gralora_layers(model).values() for inner in layer.modules() if inner is not layer}
    for name, module in model.named_modules():
        if not name or id(module) in inside:
            continue
        base = module.get_base_layer() if isinstance(module, GraloraLayer) else module
        named = any(place in tied_names for place, _ in places.of(module))
        same = weight is not None and base._parameters.get("weight") is weight
        if (same or named) and base is not source.base:
            found.append(module)
    return found


def _check(target: Target, source: Target) -> None:
    if target.kind is None or source.kind is None:
        return  # refused like any other target
    widths, expected = target.kind.features(target.base), source.kind.features(source.base)
    if widths not in (expected, expected[::-1]):
        raise ValueError(
            f"`ensure_weight_tying` must find the widths of {source.name!r}, {expected}, in what is tied to it; got "
            f"{widths} at {target.name!r}."
        )


def _name_in(config: GraloraConfig, source: Target, found: list[Target]) -> None:
    """Make `target_modules` name the input embedding, so that a saved adapter finds it too."""
    if any(target.module is source.module for target in found):
        return
    asked: Any = config.target_modules
    named = f"(?:{asked})|{re.escape(source.name)}" if isinstance(asked, str) else {*(asked or ()), source.name}
    config.target_modules = named  # pyright: ignore[reportAttributeAccessIssue]
