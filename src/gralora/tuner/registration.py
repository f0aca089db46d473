"""The one place that touches PEFT's registries and private names.

PEFT finds a tuner by type in three dictionaries, which all its modules share, and users find the classes as
attributes of `peft`. Both are replaced by ours, and restored by `unregister`.
"""

import functools
import gc
from collections.abc import Callable
from typing import Any

import peft
import peft.functional
import peft.peft_model
import peft.tuners.gralora
import peft.utils.save_and_load
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils import transformers_weight_conversion as conversion
from transformers.core_model_loading import WeightRenaming

from gralora.tuner import saving
from gralora.tuner.config import GraloraConfig
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.model import GraloraModel

_REGISTRIES = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, GraloraConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, GraloraModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, GraloraModel.prefix),
)
_NAMESPACES = (peft, peft.tuners, peft.tuners.gralora)
# Who calls `get_peft_model_state_dict` by a name of its own.
_SAVERS = (peft, peft.functional, peft.peft_model, peft.utils, peft.utils.save_and_load)
_CLASSES = {"GraloraConfig": GraloraConfig, "GraloraModel": GraloraModel, "GraloraLayer": GraloraLayer}


def register() -> None:
    """Make PEFT use our classes for `PeftType.GRALORA` wherever it looks them up. Idempotent."""
    if _undo_list() and all(registry[PeftType.GRALORA] == ours for registry, ours in _REGISTRIES):
        return
    _undo_all()  # classes of ours from before a reload
    undo: list[Callable[[], None]] = []
    for registry, ours in _REGISTRIES:
        undo.append(_item_restorer(registry, PeftType.GRALORA))
        registry[PeftType.GRALORA] = ours
    for namespace in _NAMESPACES:
        for name, ours in _CLASSES.items():
            if hasattr(namespace, name):
                _set_attribute(namespace, name, ours, undo)
    _set_attribute(GraloraConfig, "is_registered", True, undo)
    mapping = _with_our_names(conversion.build_peft_weight_mapping)
    _set_attribute(conversion, "build_peft_weight_mapping", mapping, undo)
    for namespace in _SAVERS:
        save = _without_unchanged_embeddings(namespace.get_peft_model_state_dict)
        _set_attribute(namespace, "get_peft_model_state_dict", save, undo)
    tuner: Any = GraloraModel
    tuner._undo_registration = undo  # at what is registered, which outlives a reload of this module


def unregister() -> None:
    """Put PEFT's own classes back.

    Raises:
        RuntimeError: A model with our GraLoRA layers is alive; PEFT's own tuner could neither save nor
            change it.
    """
    if not _undo_list():
        return
    gc.collect()
    if alive := len(GraloraLayer.alive):
        raise RuntimeError(
            f"`unregister` needs that no model uses gralora any more; {alive} GraLoRA layers are alive. "
            "Delete the models that hold them first."
        )
    _undo_all()


def _undo_list() -> list[Callable[[], None]]:
    """Return what undoes the registration, empty where there is none."""
    return getattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRALORA], "_undo_registration", [])


def _undo_all() -> None:
    for undo in reversed(_undo_list()):
        undo()


def _set_attribute(owner: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _item_restorer(registry: dict[Any, Any], key: PeftType) -> Callable[[], None]:
    before = registry[key]
    return lambda: registry.__setitem__(key, before)


@functools.cache
def _with_our_names(build_peft_weight_mapping: Callable[..., Any]) -> Callable[..., Any]:
    """Add our parameter names to the renamings of transformers' `load_adapter`, which asks no tuner."""

    @functools.wraps(build_peft_weight_mapping, assigned=(), updated=())
    def build(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
        mapping = build_peft_weight_mapping(weight_conversions, adapter_name, peft_config=peft_config)
        if mapping and getattr(peft_config, "peft_type", None) == PeftType.GRALORA:
            mapping.append(WeightRenaming(rf"(gralora_[AB]\.{adapter_name})$", r"\1.weight"))
        return mapping

    return build


@functools.cache
def _without_unchanged_embeddings(get_peft_model_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Make "auto" save base weights of adapted embeddings where they changed, while PEFT saves those of all targets."""

    @functools.wraps(get_peft_model_state_dict)
    def get(
        model: Any,
        state_dict: Any = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: Any = "auto",
    ) -> Any:
        plain = getattr(model, "_orig_mod", model) if unwrap_compiled else model
        if save_embedding_layers == "auto" and saving.adapted_embeddings(plain, adapter_name):
            save_embedding_layers = saving.embeddings_changed(plain, adapter_name)
        return get_peft_model_state_dict(model, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)

    return get
