"""What an adapter's config says of a layer that is not linear, since the tensors of the adapter do not tell it."""

from dataclasses import dataclass, fields
from typing import Any

# Dimensions of the weights whose shape is recorded.
_DIMENSIONS = {"conv": (3, 4, 5), "embedding": (2,)}


@dataclass(frozen=True)
class LayerRecord:
    """An entry of `GraloraConfig.layer_kinds`, checked; a linear layer has none.

    Attributes:
        kind: "linear", "conv", "embedding", "parameter", "attention", or another kind that a program has added.
        parameter: Name of the adapted parameter in its module; None for the weight of a layer that is called.
        shape: Shape of the weight of a convolution, `[out, in / groups, *kernel]`, or of an embedding, `[V, d]`.
        groups: Groups of a convolution.
        dilation: Whether a convolution is dilated.
        padding_mode: How a convolution pads.
        transposed: Whether the matrices of a stack are stored as `[in, out]`.
        unmarked: Whether they are, in a module that has no attribute `is_transposed` to say so.
        interleaved: Whether the rows of gate and up alternate in the weight that fuses them.
        partial: Whether the adapter was imported from a LoRA, whose file does not tell the three before this.
        former: "mixtral" where the experts were named as Mixtral's in transformers 4, else "".
    """

    kind: str = "linear"
    parameter: str | None = None
    shape: tuple[int, ...] | None = None
    groups: int = 1
    dilation: bool = False
    padding_mode: str = "zeros"
    transposed: bool = False
    unmarked: bool = False
    interleaved: bool = False
    partial: bool = False
    former: str = ""

    @classmethod
    def of(cls, written: Any, name: str, where: str) -> "LayerRecord":
        """Return an entry as it is written in a config.

        Raises:
            ValueError: A value breaks its rule.
        """
        if not isinstance(written, dict) or not isinstance(written.get("kind"), str):
            raise ValueError(f"`layer_kinds` must say the kind of {name!r}; got {written!r} in {where!r}.")
        kind, parameter, shape, groups = (written.get(field) for field in ("kind", "parameter", "shape", "groups"))
        rules = {
            "parameter": isinstance(parameter, str) or (parameter is None and kind not in ("parameter", "attention")),
            "shape": _is_shape(shape, kind) or (shape is None and kind not in _DIMENSIONS),
            "groups": groups is None or _is_size(groups),
        }
        for field, is_kept in rules.items():
            if not is_kept:
                raise ValueError(
                    f"`layer_kinds` must have a valid {field!r} for the {kind} {name!r}; got {written.get(field)!r} in "
                    f"{where!r}."
                )
        flags = {
            flag: bool(written.get(flag)) for flag in ("dilation", "transposed", "unmarked", "interleaved", "partial")
        }
        texts = {text: str(written.get(text, default)) for text, default in (("padding_mode", "zeros"), ("former", ""))}
        return cls(
            kind,
            parameter,
            None if shape is None else tuple(shape),
            groups or 1,
            **flags,
            **texts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults, as they are written."""
        return {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default or f.name == "kind"
        }


def _is_shape(shape: Any, kind: str) -> bool:
    if not isinstance(shape, list | tuple) or not all(_is_size(size) for size in shape):
        return False
    return len(shape) in _DIMENSIONS.get(kind, range(2, 6))


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
