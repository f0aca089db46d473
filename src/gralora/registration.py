"""The one place that touches PEFT's registries and private names.

PEFT finds a tuner by type in three dictionaries that every module of it imports by reference, and users
find the classes as attributes of `peft`. Both are exchanged for ours, and put back by `unregister`.
"""

import gc
from collections.abc import Callable
from typing import Any

import peft
import peft.tuners.gralora
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, transformers_weight_conversion
from transformers.core_model_loading import WeightRenaming

from gralora.config import GraloraConfig
from gralora.layer import GraloraLayer
from gralora.model import GraloraModel

_REGISTRIES = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, GraloraConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, GraloraModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, GraloraModel.prefix),
)
_NAMESPACES = (peft, peft.tuners, peft.tuners.gralora)
_CLASSES = {"GraloraConfig": GraloraConfig, "GraloraModel": GraloraModel, "GraloraLayer": GraloraLayer}

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Make PEFT use our classes for `PeftType.GRALORA` wherever it looks them up. Idempotent."""
    if _undo:
        return
    for registry, ours in _REGISTRIES:
        _undo.append(_item_restorer(registry, PeftType.GRALORA))
        registry[PeftType.GRALORA] = ours
    for namespace in _NAMESPACES:
        for name, ours in _CLASSES.items():
            if hasattr(namespace, name):
                _set_attribute(namespace, name, ours)
    _set_attribute(transformers_weight_conversion, "build_peft_weight_mapping", _build_weight_mapping)


def unregister() -> None:
    """Put PEFT's own classes back.

    Raises:
        RuntimeError: A model with GraLoRA layers of ours is alive; PEFT's own could neither save nor
            change it.
    """
    if not _undo:
        return
    gc.collect()
    alive = sum(issubclass(type(thing), GraloraLayer) for thing in gc.get_objects())
    if alive:
        raise RuntimeError(
            f"`unregister` needs that no model uses gralora any more; {alive} GraLoRA layers are alive. "
            "Delete the models that hold them first."
        )
    while _undo:
        _undo.pop()()


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _item_restorer(registry: dict[Any, Any], key: PeftType) -> Callable[[], None]:
    before = registry[key]
    return lambda: registry.__setitem__(key, before)


_peft_build_weight_mapping = transformers_weight_conversion.build_peft_weight_mapping


def _build_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
    """Add our parameter names to the renamings of transformers' `load_adapter`, which asks no tuner."""
    mapping = _peft_build_weight_mapping(weight_conversions, adapter_name, peft_config=peft_config)
    if mapping and getattr(peft_config, "peft_type", None) == PeftType.GRALORA:
        mapping.append(WeightRenaming(rf"(gralora_[AB]\.{adapter_name})$", r"\1.weight"))
    return mapping
