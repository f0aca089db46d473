"""The table of layer kinds, and which of them takes a module or a parameter."""

from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from gralora.tuner.conv import Conv
from gralora.tuner.embedding import Embedding
from gralora.tuner.experts import Experts
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.linear import Conv1D, Linear
from gralora.tuner.parameters import ParameterLayer

KINDS: tuple[type[GraloraLayer], ...] = (Linear, Conv1D, Conv, Embedding)


def kind_for(base: nn.Module, backend: QuantizationBackend | None) -> type[GraloraLayer] | None:
    """Return the kind of layer for `base`, or None where there is none."""
    return next((kind for kind in KINDS if kind.covers(base, backend)), None)


def kind_refusal(base: nn.Module, backend: QuantizationBackend | None) -> str | None:
    """Return why no kind takes `base`, or None where one does."""
    kind = kind_for(base, backend)
    if kind is not None:
        return kind.refusal(base)
    nouns = [kind.noun for kind in (*KINDS, ParameterLayer)]
    return f"GraLoRA adapts {', '.join(nouns[:-1])} and {nouns[-1]}; got {type(base).__name__}."


def parameter_kind(base: nn.Module, parameter_name: str, backend: QuantizationBackend | None) -> type[GraloraLayer]:
    """Return the kind of layer for one parameter of `base`; that of `base` itself where its weight is meant."""
    kind = kind_for(base, backend)
    if kind is not None and parameter_name in kind.parameters_of(base):
        return kind
    return Experts if Experts.projections(base) else ParameterLayer
