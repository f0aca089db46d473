"""The table of layer kinds, which of them takes a module or a parameter, and kinds of a user's own."""

from typing import TypeVar

from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from gralora.tuner.attention import Attention
from gralora.tuner.conv import Conv
from gralora.tuner.embedding import Embedding
from gralora.tuner.experts import Experts
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.linear import Conv1D, Linear
from gralora.tuner.parameters import ParameterLayer

KINDS: tuple[type[GraloraLayer], ...] = (Linear, Conv1D, Conv, Embedding, Attention)


_registered: list[type[GraloraLayer]] = []
# What a kind must say, since the base class cannot.
_HOOKS = ("covers", "features", "update")

Kind = TypeVar("Kind", bound=type[GraloraLayer])


def register_kind(kind: Kind) -> Kind:
    """Make adapters of `kind` on the modules that it covers, before any kind of this package is asked. Idempotent.

    The base class does merging, saving, several adapters and the rest, from what the hooks of `kind` say; see
    `GraloraLayer`. Loading an adapter needs the same registration.

    Args:
        kind: Subclass of `GraloraLayer` with at least `noun`, `covers`, `features` and `update`.

    Returns:
        `kind`, so that this can be used as a decorator.

    Raises:
        TypeError: `kind` is no subclass of `GraloraLayer`, or lacks a hook.

    Example:
        >>> import torch
        >>> from gralora import GraloraConfig, get_peft_model
        >>> from gralora.tuner import blocks
        >>> from gralora.tuner.merging.weight import WeightRef
        >>> class Doubled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.zeros(4, 8))
        ...     def forward(self, x):
        ...         return 2 * (x @ self.table.T)
        >>> @register_kind
        ... class OnDoubled(GraloraLayer):
        ...     noun = "doubled layers"
        ...     @classmethod
        ...     def covers(cls, base, backend):
        ...         return isinstance(base, Doubled)
        ...     @classmethod
        ...     def parameters_of(cls, base):
        ...         return ("table",)
        ...     @classmethod
        ...     def features(cls, base, parameter_name="table"):
        ...         return 8, 4
        ...     def weight_ref(self):
        ...         return WeightRef(self.get_base_layer(), "table")
        ...     def update(self, x, factors):
        ...         return 2 * blocks.apply(x, factors)
        >>> config = GraloraConfig(r=4, target_modules=["0"], init_weights=False)
        >>> model = get_peft_model(nn.Sequential(Doubled()), config)
        >>> x = torch.ones(3, 8)
        >>> y = model(x)
        >>> model.merge_adapter()
        >>> torch.allclose(model(x), y, atol=1e-5)
        True
        >>> unregister_kind(OnDoubled)
    """
    if not (isinstance(kind, type) and issubclass(kind, GraloraLayer)):
        raise TypeError(f"`kind` must be a subclass of gralora.GraloraLayer; got {kind!r}.")
    missing = [hook for hook in _HOOKS if _is_abstract(kind, hook)]
    if not hasattr(kind, "noun"):
        missing.append("noun")
    if missing:
        raise TypeError(f"`kind` must define {', '.join(missing)}; {kind.__name__} does not. See gralora.GraloraLayer.")
    if kind not in _registered:
        _registered.insert(0, kind)
    return kind


def unregister_kind(kind: type[GraloraLayer]) -> None:
    """Take back a `register_kind`; layers that were made stay as they are.

    Raises:
        ValueError: `kind` is not registered.
    """
    if kind not in _registered:
        raise ValueError(f"`kind` must have been registered; got {kind!r}.")
    _registered.remove(kind)


def _is_abstract(kind: type[GraloraLayer], hook: str) -> bool:
    own, base = getattr(kind, hook), getattr(GraloraLayer, hook)
    return getattr(own, "__func__", own) is getattr(base, "__func__", base)


def all_kinds() -> tuple[type[GraloraLayer], ...]:
    """Return the registered kinds, the latest first, and those of this package."""
    return (*_registered, *KINDS)


def kind_for(base: nn.Module, backend: QuantizationBackend | None) -> type[GraloraLayer] | None:
    """Return the kind of layer for `base`, or None where there is none."""
    return next((kind for kind in all_kinds() if kind.covers(base, backend)), None)


def kind_refusal(base: nn.Module, backend: QuantizationBackend | None) -> str | None:
    """Return why no kind takes `base`, or None where one does."""
    kind = kind_for(base, backend)
    if kind is not None:
        return kind.refusal(base)
    nouns = [kind.noun for kind in (*all_kinds(), ParameterLayer)]
    return f"GraLoRA adapts {', '.join(nouns[:-1])} and {nouns[-1]}; got {type(base).__name__}."


def parameter_kind(base: nn.Module, parameter_name: str, backend: QuantizationBackend | None) -> type[GraloraLayer]:
    """Return the kind of layer for one parameter of `base`; that of `base` itself where its weight is meant."""
    kind = kind_for(base, backend)
    if kind is not None and parameter_name in kind.parameters_of(base):
        return kind
    return Experts if Experts.projections(base) else ParameterLayer
