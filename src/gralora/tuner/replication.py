"""Stacking layers of a model several times, each copy with an adapter of its own (`layer_replication`).

The copies share the frozen weights. PEFT's `replicate_layers` does the stacking. What it leaves out is done here:
checks before anything changes, settings of each layer in the model's config, and weights of their own after a merge.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from torch import nn

from gralora.tuner.config import GraloraConfig
from gralora.tuner.layer import gralora_layers

# Lists in a model's config with an entry for each layer.
_PER_LAYER = ("layer_types", "mlp_layer_types")


def replicate(model: nn.Module, config: GraloraConfig, others: list[GraloraConfig]) -> None:
    """Replace the layers of `model` by those that `config` asks for, unless another adapter has done that before.

    Args:
        model: Base model.
        config: Config of the adapter that is put on.
        others: Configs of the adapters that are on the model.

    Raises:
        ValueError: The ranges do not fit the layers, or the adapters on the model have other ones.
    """
    if others and gralora_layers(model):
        if any(other.layer_replication != config.layer_replication for other in others):
            raise ValueError(
                "`layer_replication` must be the same for all adapters on a model; got layer_replication="
                f"{config.layer_replication!r}, and there is {others[0].layer_replication!r}."
            )
        return
    ranges = config.layer_replication
    if not ranges:
        return
    layers = layers_of(model)
    if any(not 0 <= start < stop <= len(layers) for start, stop in ranges):
        raise ValueError(
            f"`layer_replication` must hold ranges [start, stop) within the {len(layers)} layers of the model; got "
            f"layer_replication={ranges!r}."
        )
    replicate_layers(model, [(start, stop) for start, stop in ranges])
    settings = _settings_of(model)
    for name in _PER_LAYER:
        entries = getattr(settings, name, None)
        if isinstance(entries, list) and len(entries) == len(layers):
            setattr(settings, name, [entries[i] for start, stop in ranges for i in range(start, stop)])


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of layers that PEFT would replicate.

    Raises:
        ValueError: There is none.
    """
    inner: Any = _inner(model)
    for owner, name in ((inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h")):
        if isinstance(layers := getattr(owner, name, None), nn.ModuleList):
            return layers
    raise ValueError(
        f"`layer_replication` needs a model built like Llama, BERT or Falcon; {type(model).__name__} has no list of "
        "layers at `model.layers`, `encoder.layer` or `h`."
    )


def give_own_weights(model: nn.Module) -> None:
    """Give every layer of `model` parameters of its own, so that the model can be saved."""
    seen: set[int] = set()
    for module in layers_of(model).modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            elif parameter is not None:
                seen.add(id(parameter))


@contextmanager
def settings_restored(model: nn.Module) -> Iterator[None]:
    """Put the settings in the model's config that depend on its layers back if the body raises."""
    settings = getattr(_settings_of(model), "__dict__", {})
    before = {name: settings[name] for name in ("num_hidden_layers", *_PER_LAYER) if name in settings}
    try:
        yield
    except BaseException:
        settings.update(before)
        raise


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside, as PEFT looks for it."""
    while isinstance(inner := getattr(model, "model", None), nn.Module):
        model = inner
    return getattr(model, "bert", model)


def _settings_of(model: nn.Module) -> Any:
    return getattr(_inner(model), "config", None)
