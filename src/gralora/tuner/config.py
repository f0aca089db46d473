# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The configuration of an adapter, and every check that needs no model."""

import copy
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, TaskType
from peft.utils.other import get_pattern_key

from gralora.checks import is_number, require_integer, require_positive

# Fields that PEFT's own GraLoRA does not know. They reach `adapter_config.json` only where they differ
# from their default, so that an adapter which does without them loads in plain PEFT.
EXTRA_FIELDS = (
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "k_pattern",
    "use_rslora",
    "trainable_token_indices",
    "target_parameters",
    "layer_kinds",
    "layer_replication",
    "ensure_weight_tying",
)
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one adapter on one layer, patterns applied."""

    r: int
    hybrid_r: int
    alpha: float
    gralora_k: int
    gralora_dropout: float
    init_weights: bool
    use_rslora: bool

    @property
    def scale(self) -> float:
        """`alpha / (r + hybrid_r)`, or `alpha / sqrt(r + hybrid_r)` with `use_rslora`."""
        rank = self.r + self.hybrid_r
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def width_refusal(self, in_features: int, out_features: int, pads_inputs: bool = False) -> str | None:
        """Return why these blocks do not fit a weight of these widths, or None where they do.

        Args:
            in_features: Width of the input.
            out_features: Width of the output.
            pads_inputs: Whether the last input block may reach beyond the input's features.
        """
        if not in_features or not out_features:
            return "it must be initialised; run one forward pass first."
        k = self.gralora_k
        sizes = {"r": self.r, "in_features": in_features, "out_features": out_features}
        if pads_inputs:
            del sizes["in_features"]
        for name, value in sizes.items():
            if value % k:
                fitting = [d for d in range(1, self.r + 1) if not any(size % d for size in sizes.values())]
                return (
                    f"`gralora_k` must divide `{name}`; got gralora_k={k} with {name}={value}. "
                    f"Values that fit {', '.join(f'{n}={size}' for n, size in sizes.items())}: "
                    f"{', '.join(map(str, fitting))}."
                )
        return None


@dataclass
class GraloraConfig(PeftConfig):
    """Configuration of a GraLoRA adapter (Jung et al., NeurIPS 2025, arXiv 2505.20355).

    Every value is checked here; what depends on the model is checked when the adapter is injected, before
    anything is changed.

    Args:
        r: Rank, as LoRA counts it: parameters are those of LoRA at rank `r`. A positive multiple of
            `gralora_k`.
        hybrid_r: Rank of the plain LoRA beside the blocks; 0 for none.
        target_modules: Module names (matched at their end), a regular expression over the whole name,
            `"all-linear"`, or None for PEFT's choice for the architecture. The last two are replaced, when the
            adapter is injected, by names that match the chosen modules and no others.
        alpha: The update is scaled by `alpha / (r + hybrid_r)`.
        gralora_dropout: Probability in [0, 1) of dropping an input of the adapter; both parts see the
            same draw.
        gralora_k: Blocks per side. Divides `r` and both widths of every adapted layer. The paper takes 2
            at rank 32 or less, 4 from rank 64 on.
        fan_in_fan_out: Kept for compatibility: each layer's layout is read off its type.
        bias: `"none"`, `"all"`, or `"gralora_only"` to train the biases of adapted layers.
        modules_to_save: Modules to train and save whole. PEFT adds the heads of classification and question
            answering, by `task_type`.
        init_weights: True starts at an update of exactly zero, False at a random one.
        layers_to_transform: Layer index or indices to adapt. Needs `target_modules` to be a list.
        layers_pattern: Name of the list of layers, where it is not one of the common ones.
        exclude_modules: Names, or a regular expression, of modules to leave alone.
        rank_pattern: `r` for modules whose name matches the key (a name or a regular expression).
        alpha_pattern: The same for `alpha`.
        k_pattern: The same for `gralora_k`.
        target_parameters: Names of parameters to adapt (matched at their end), such as `experts.gate_up_proj`:
            2-D weights, or the 3-D weights of a mixture's experts, whose blocks are those of each expert.
            `"all-linear"` adds those of experts. All adapters on a module must name the same of its parameters.
        layer_kinds: Set when the adapter is injected: what the tensors of layers that are not linear do not tell,
            by the name of the layer, so that the adapter can be read without its base model.
        layer_replication: Ranges `[start, stop]` of layers, stacked in this order in place of the model's, each with an
            adapter of its own over shared weights, as in PEFT's LoRA.
        use_rslora: Scale by `alpha / sqrt(r + hybrid_r)` (Kalajdzievski, arXiv 2312.03732).
        trainable_token_indices: Rows of the embedding to train beside the adapter, as in PEFT's LoRA.
        ensure_weight_tying: Where a target, or one of `modules_to_save`, shares its weight with the input embedding,
            adapt all modules that share it with one set of parameters. The input embedding is then a target.

    Raises:
        ValueError: A value breaks its rule; the message names both.

    Example:
        >>> GraloraConfig(r=32, gralora_k=3)
        Traceback (most recent call last):
        ...
        ValueError: `gralora_k` must divide `r`; got gralora_k=3 with r=32. Values that fit: 1, 2, 4, 8, 16, 32.
    """

    r: int = 32
    hybrid_r: int = 0
    target_modules: list[str] | str | None = None
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    k_pattern: dict[str, int] | None = field(default_factory=dict)
    use_rslora: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    layer_kinds: dict[str, dict[str, Any]] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    ensure_weight_tying: bool = False
    is_registered: ClassVar[bool] = False  # whether PEFT uses our tuner

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GRALORA
        self.check()

    def check(self) -> None:
        """Check every field, as at creation.

        Raises:
            ValueError: A value breaks its rule.
        """
        self._normalise_collections()
        self._check_values()
        self._check_layer_selection()

    @property
    def asks_for_all_linear(self) -> bool:
        """Whether `target_modules` is `"all-linear"`, in any case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @property
    def is_prompt_learning(self) -> bool:
        """False. PEFT asks this before it injects an adapter, when its own tuner would drop fields of ours.

        Raises:
            ValueError: The tuner that PEFT uses does not know a field that is set.
        """
        if self.is_registered:  # asked in every forward pass, compiled ones included
            return False
        known = {f.name for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GRALORA])}
        if unknown := [name for name in EXTRA_FIELDS if name not in known and getattr(self, name)]:
            raise ValueError(
                "A config for PEFT's own GraLoRA must do without fields that it does not know; got "
                f"{', '.join(f'{name}={getattr(self, name)!r}' for name in unknown)}. Call `gralora.register()` first."
            )
        return False

    @classmethod
    def adopt(cls, config: Any) -> "GraloraConfig":
        """Return `config` itself, checked again, if it is of this class, else a copy of this class."""
        if isinstance(config, cls):
            config.check()
            return config
        adopted = cls.copy_of(config)
        # PEFT adds these heads to the caller's config when the adapter is on: one list for both.
        if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
            adopted.modules_to_save = config.modules_to_save = list(adopted.modules_to_save or ())
        return adopted

    @classmethod
    def copy_of(cls, config: PeftConfig) -> "GraloraConfig":
        """Return a checked, independent copy of `config`, which may be of PEFT's own class."""
        known = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(cls) if hasattr(config, f.name)}
        return cls(**known)

    def settings_for(self, name: str, module_name: str | None = None) -> LayerSettings:
        """Return the settings of the layer on the weight called `name`.

        Args:
            name: Full name of a module, or of a parameter.
            module_name: Full name of the parameter's module, which the patterns may mean as well.

        Raises:
            ValueError: The patterns give that layer a `gralora_k` that does not divide its `r`.
        """

        def value_of(patterns: dict[str, Any] | None, default: Any) -> Any:
            keys = [get_pattern_key(list(patterns or {}), meant) for meant in (name, module_name) if meant]
            return next(((patterns or {})[key] for key in keys if key in (patterns or {})), default)

        r, k = value_of(self.rank_pattern, self.r), value_of(self.k_pattern, self.gralora_k)
        if r % k:
            raise ValueError(
                f"`gralora_k` must divide `r`; got gralora_k={k} with r={r} at {name!r}. "
                f"Change `rank_pattern` or `k_pattern` for it. Values that fit: {_divisors(r)}."
            )
        return LayerSettings(
            r=r,
            hybrid_r=self.hybrid_r,
            alpha=value_of(self.alpha_pattern, self.alpha),
            gralora_k=k,
            gralora_dropout=self.gralora_dropout,
            init_weights=self.init_weights,
            use_rslora=self.use_rslora,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as `adapter_config.json` holds them.

        Fields that PEFT's own GraLoRA does not know are left out at their defaults. A uniform `use_rslora` is
        written as the plain `alpha` of the same scale.
        """
        written = super().to_dict()
        if self.use_rslora and not self.rank_pattern and not self.alpha_pattern:
            written["use_rslora"] = False
            written["alpha"] = _alpha_for_scale(self.settings_for("").scale, self.r + self.hybrid_r)
        for name in EXTRA_FIELDS:
            if not written[name]:
                del written[name]
        return {name: sorted(value) if isinstance(value, set) else value for name, value in written.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and warn if plain PEFT could not read the adapter."""
        ours_only = [name for name in EXTRA_FIELDS if name in self.to_dict()]
        if ours_only:
            warnings.warn(
                f"This adapter uses {', '.join(f'`{name}`' for name in ours_only)}, which PEFT's own GraLoRA does "
                "not know: `import gralora` before loading it.",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)

    def _normalise_collections(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, set | tuple):
            self.target_parameters = sorted(self.target_parameters)
        for name in ("rank_pattern", "alpha_pattern", "k_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})

    def _check_values(self) -> None:
        require_integer("r", self.r, minimum=1)
        require_integer("hybrid_r", self.hybrid_r, minimum=0)
        require_integer("gralora_k", self.gralora_k, minimum=1)
        if self.r % self.gralora_k:
            raise ValueError(
                f"`gralora_k` must divide `r`; got gralora_k={self.gralora_k} with r={self.r}. "
                f"Values that fit: {_divisors(self.r)}."
            )
        require_positive("alpha", self.alpha)
        if not is_number(self.gralora_dropout) or not 0 <= self.gralora_dropout < 1:
            raise ValueError(f"`gralora_dropout` must be in [0, 1); got gralora_dropout={self.gralora_dropout!r}.")
        if self.bias not in ("none", "all", "gralora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'gralora_only'; got bias={self.bias!r}.")
        for name in ("init_weights", "use_rslora", "fan_in_fan_out", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False; got {name}={getattr(self, name)!r}.")
        for name in ("rank_pattern", "k_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise ValueError(f"`{name}` must map module names to values; got {name}={patterns!r}.")
            for key, value in patterns.items():
                if name == "alpha_pattern":
                    require_positive(f"{name}[{key!r}]", value)
                else:
                    require_integer(f"{name}[{key!r}]", value, minimum=1)

    def _check_layer_selection(self) -> None:
        if self.target_modules is not None and not isinstance(self.target_modules, str | set):
            raise ValueError(
                "`target_modules` must be a list of names, a regular expression or 'all-linear'; "
                f"got target_modules={self.target_modules!r}."
            )
        parameters: Any = self.target_parameters
        if not (parameters is None or (isinstance(parameters, list) and all(isinstance(p, str) for p in parameters))):
            raise ValueError(
                "`target_parameters` must be a list of names, such as 'experts.gate_up_proj'; "
                f"got target_parameters={parameters!r}."
            )
        ranges: Any = self.layer_replication
        if ranges is not None:
            if not (isinstance(ranges, list | tuple) and all(_is_range(pair) for pair in ranges)):
                raise ValueError(
                    "`layer_replication` must be a list of ranges [start, stop] of layers; got "
                    f"layer_replication={ranges!r}."
                )
            self.layer_replication = [(start, stop) for start, stop in ranges]  # JSON has lists
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` must not be given when `target_modules` is a string; got {name}="
                    f"{getattr(self, name)!r} with target_modules={self.target_modules!r}. "
                    "Give `target_modules` as a list, or put the layers into the regular expression."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` must come with `layers_to_transform`; got layers_pattern={self.layers_pattern!r}."
            )


def _is_range(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(type(end) is int for end in pair)


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _divisors(number: int) -> str:
    return ", ".join(map(str, divisors(number)))


def _alpha_for_scale(scale: float, rank: int) -> float:
    """Return the alpha with `alpha / rank == scale`, to the last bit where such a float exists."""
    alpha = scale * rank
    neighbours = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
    return min(neighbours, key=lambda candidate: abs(candidate / rank - scale))
