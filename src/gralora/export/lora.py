"""GraLoRA to LoRA: the same map, in a folder that every program loads that knows LoRA.

A GraLoRA adapter is a LoRA of rank `k·r + hybrid_r` with block-sparse factors (`blocks.lora_factors`), so the
conversion copies. What is decided here is what programs ask for: one rank for all layers, one integer
`lora_alpha`, and nothing in the folder but `lora_A` and `lora_B`.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gralora.export.verify import LayerError, LoraFile, compare, worst
from gralora.files.adapter_folder import AdapterFolder
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import PREFIX, Adapter, open_adapter
from gralora.tuner import blocks, svd
from gralora.tuner.numerics import threads_for

# What float32 may add to the error of an update, relative to its norm.
_TOLERANCE = 1e-6
# Below this share of the norm, singular values are rounding errors of the decomposition.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer.

    Attributes:
        name: Of the module in the base model.
        rank: `k·r + hybrid_r`.
        kept: Rows of `lora_A` that are not padding.
        relative_error: Frobenius norm of what compression cut off, relative to that of ΔW; 0 for a copy.
        measured: What reading the written file back found; None before that.
    """

    name: str
    rank: int
    kept: int
    relative_error: float
    measured: LayerError | None = None


@dataclass
class LoraExport(AdapterFolder):
    """A LoRA adapter made of a GraLoRA one.

    Attributes:
        rank: Of every layer.
        layers: What became of each.
        relative_error: Frobenius norm of what compression cut off in the whole model, relative to that of ΔW.
        path: Where it was written; None before that.
    """

    rank: int
    layers: tuple[ExportedLayer, ...]
    relative_error: float
    path: Path | None = None

    @property
    def worst(self) -> ExportedLayer | None:
        """The layer with the largest measured error, or None before anything was read back."""
        return worst(self.layers)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What is wanted of an export.

    Attributes:
        dtype: Of the tensors; None copies the stored one, and takes at least float32 for what is computed.
        max_rank: Highest rank; layers above it are compressed.
        max_error: Instead of a rank: relative Frobenius error that compression may cost.
        per_layer: `max_error` holds for every layer, not for the model as a whole.
        target: "serving" refuses what only PEFT's LoRA can carry over: trained biases, modules and tokens.
        bake_scale: Fold the scale into B even where `lora_alpha` could state it.

    Raises:
        ValueError: A value breaks its rule.
    """

    dtype: torch.dtype | None = None
    max_rank: int | None = None
    max_error: float | None = None
    per_layer: bool = False
    target: Literal["serving", "peft"] = "serving"
    bake_scale: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16; got dtype={self.dtype!r}.")
        rank = self.max_rank
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"`max_rank` must be a positive integer; got max_rank={rank!r}.")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise ValueError(f"`max_error` must be in [0, 1); got max_error={self.max_error!r}.")
        if self.per_layer and self.max_error is None:
            raise ValueError("`per_layer` must come with `max_error`; got per_layer=True alone.")
        if self.target not in ("serving", "peft"):
            raise ValueError(f"`target` must be 'serving' or 'peft'; got target={self.target!r}.")


def to_lora(
    source: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
    max_error: float | None = None,
    per_layer: bool = False,
    target: Literal["serving", "peft"] = "serving",
    overwrite: bool = False,
    adapter_name: str = "default",
) -> LoraExport:
    """Turn a GraLoRA adapter into the LoRA adapter that is the same map.

    *Exact*: without compression every value is the stored one or zero, where the scale comes out as a whole
    `lora_alpha`; where it does not, B times the scale is rounded to float32. The base model is not needed.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: Folder to write; what was written is read back and compared, in float64, before it appears.
        dtype: Of the tensors; None copies the stored one, and takes at least float32 for what is computed.
        max_rank: Highest rank; layers above it are compressed to the best approximation of that rank.
        max_error: Instead of a rank: the smallest one whose relative Frobenius error is at most this.
        per_layer: `max_error` holds for every layer, not for the model as a whole.
        target: "serving", or "peft" to carry over trained biases, whole modules and rows of embeddings.
        overwrite: Replace an adapter at `output`.
        adapter_name: Which adapter of a model.

    Raises:
        FileNotFoundError: `source` is no folder of an adapter.
        ValueError: A damaged adapter, one that holds more than LoRA can be served with, or a bad option.
        RuntimeError: What was read back is not what was written.

    Example:
        >>> from gralora import GraloraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), GraloraConfig(r=4, alpha=8, target_modules=["0"]))
        >>> lora = to_lora(model)
        >>> lora.rank, lora.config["lora_alpha"], list(lora.tensors)
        (8, 16, ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight'])
    """
    options = LoraOptions(dtype=dtype, max_rank=max_rank, max_error=max_error, per_layer=per_layer, target=target)
    inputs = () if isinstance(source, nn.Module) else (Path(source),)
    path = None if output is None else check_output(output, overwrite, inputs)
    adapter = open_adapter(source, adapter_name)
    export = convert(adapter, options)
    if path is None:
        return export
    with appearing(path) as folder:
        export.write(folder)
        export = check_written(adapter, export, LoraFile(folder), options)
    return replace(export, path=path)


def convert(adapter: Adapter, options: LoraOptions) -> LoraExport:
    """Return the LoRA of `adapter`, one layer at a time.

    Raises:
        ValueError: The adapter holds more than LoRA can be served with, or values that are not finite.
    """
    check_servable(adapter, options.target)
    with threads_for(adapter.largest):
        return _convert(adapter, options)


def _convert(adapter: Adapter, options: LoraOptions) -> LoraExport:
    rank = _common_rank(adapter, options)
    lora_alpha = _common_alpha(adapter, rank) if not options.bake_scale else rank
    tensors: dict[str, Tensor] = {}
    layers, cut, whole = [], 0.0, 0.0
    for name, layer in adapter.layers.items():
        factors = adapter.factors(name)
        scale = layer.settings.scaling / (lora_alpha / rank)
        if layer.rank <= rank:
            lora_a, lora_b = blocks.lora_factors(factors)
            if scale != 1:
                lora_b = (lora_b.double() * scale).to(_computed(layer.dtype))
            exported = ExportedLayer(name, layer.rank, layer.rank, 0.0)
            if options.max_rank is not None or options.max_error is not None:
                whole += float(svd.core_of(factors, scale).matrix.square().sum())
        else:
            lora_a, lora_b, s = svd.best_lora(factors, scale, rank)
            kept, total = lora_a.shape[0], float(s.square().sum())
            lost = float(s[kept:].square().sum())
            cut, whole = cut + lost, whole + total
            lora_a, lora_b = lora_a.to(_computed(layer.dtype)), lora_b.to(_computed(layer.dtype))
            exported = ExportedLayer(name, layer.rank, kept, math.sqrt(lost / total) if total else 0.0)
        layers.append(exported)
        for letter, matrix in (("A", _pad(lora_a, rank, 0)), ("B", _pad(lora_b, rank, 1))):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = _cast(matrix, options.dtype, name)
    for key in adapter.extras:
        tensors[key] = adapter.tensors.read(key)
    return LoraExport(
        config=_lora_config(adapter, rank, lora_alpha),
        tensors=tensors,
        rank=rank,
        layers=tuple(layers),
        relative_error=math.sqrt(cut / whole) if whole else 0.0,
    )


def check_servable(adapter: Adapter, target: str) -> None:
    """Refuse what a program that serves LoRA can't take.

    Raises:
        ValueError: The adapter has trained biases, whole modules or rows of embeddings.
    """
    if target == "peft" or not (adapter.extras or adapter.config.modules_to_save):
        return
    if adapter.config.trainable_token_indices:
        got = f"trainable_token_indices={adapter.config.trainable_token_indices!r}"
    elif adapter.config.modules_to_save:
        got = f"modules_to_save={sorted(adapter.config.modules_to_save)!r}"
    elif adapter.config.bias != "none":
        got = f"bias={adapter.config.bias!r}, with {len(adapter.extras)} trained biases"
    else:
        got = f"also {adapter.extras[0]!r}" + (f" and {len(adapter.extras) - 1} more" if adapter.extras[1:] else "")
    raise ValueError(
        f"An adapter to be served as LoRA must hold factors alone; got {got} in {adapter.where!r}. Fold it into the "
        "model with `gralora merge`, or export it for PEFT with --for peft."
    )


def check_written(adapter: Adapter, export: LoraExport, written: LoraFile, options: LoraOptions) -> LoraExport:
    """Return `export` with the errors that reading it back found.

    Raises:
        RuntimeError: What was written is not the update that it should be.
    """
    layers = []
    for layer in export.layers:
        with threads_for(adapter.largest):
            measured = compare(
                adapter.factors(layer.name), adapter.layers[layer.name].settings.scaling, written, layer.name
            )
        lossless = options.dtype in (None, torch.float32)
        if lossless and not measured.relative <= layer.relative_error + _TOLERANCE:
            raise RuntimeError(
                f"Nothing was exported: what was read back gives another update at {layer.name!r}, off by "
                f"{measured.relative:.1e} of its norm."
            )
        layers.append(replace(layer, measured=measured))
    return replace(export, layers=tuple(layers))


def _common_rank(adapter: Adapter, options: LoraOptions) -> int:
    full = max(layer.rank for layer in adapter.layers.values())
    limit = full if options.max_rank is None else min(full, options.max_rank)
    if options.max_error is None:
        return limit
    tails = {}
    for name, layer in adapter.layers.items():
        norms = svd.tail_norms(svd.singular_values(adapter.factors(name), layer.settings.scaling))
        tails[name] = torch.nn.functional.pad(norms, (0, full + 1 - len(norms)))
    errors = torch.stack(list(tails.values()))
    if options.per_layer:
        relative = (errors / errors[:, :1].clamp_min(torch.finfo(errors.dtype).tiny)).amax(0)
    else:
        relative = errors.square().sum(0).sqrt() / errors[:, 0].square().sum().sqrt().clamp_min(1e-300)
    enough = relative <= max(options.max_error, _ROUNDING)
    enough[0] = False
    needed = int(enough.nonzero()[0]) if enough.any() else full
    if needed > limit:
        raise ValueError(
            f"`max_rank` must be at least {needed} for max_error={options.max_error:g}; got "
            f"max_rank={options.max_rank}, with which the error is {float(relative[limit]):.3g}."
        )
    return needed


def _common_alpha(adapter: Adapter, rank: int) -> int:
    """Return the `lora_alpha` that states the scale of most layers, or `rank` where none comes out whole."""
    scales = Counter(layer.settings.scaling for layer in adapter.layers.values())
    for scale, _ in scales.most_common():
        alpha = round(scale * rank)
        if alpha > 0 and alpha / rank == scale:
            return alpha
    return rank


def _lora_config(adapter: Adapter, rank: int, lora_alpha: int) -> dict[str, Any]:
    """Return the fields that programs read, and no field that an older PEFT does not know."""
    config = adapter.config
    task_type = config.task_type
    return {
        "peft_type": "LORA",
        "task_type": getattr(task_type, "value", task_type),
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(adapter),
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": {"gralora_only": "lora_only"}.get(config.bias, config.bias) if adapter.extras else "none",
        "modules_to_save": sorted(config.modules_to_save) if config.modules_to_save else None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    } | ({"trainable_token_indices": t} if (t := config.trainable_token_indices) else {})


def _target_modules(adapter: Adapter) -> list[str]:
    """Return short names where they mean the adapted modules and no others, else the names in full.

    Some programs know only short names; a list without exceptions matches in LoRA what it matched here.
    """
    config, names = adapter.config, list(adapter.layers)
    exceptions = config.exclude_modules or config.layers_to_transform is not None
    if isinstance(config.target_modules, str) or not config.target_modules or exceptions:
        return names
    short = {t for t in config.target_modules if any(name == t or name.endswith(f".{t}") for name in names)}
    covered = all(any(name == t or name.endswith(f".{t}") for t in short) for name in names)
    return sorted(short) if covered else names


def _computed(stored: torch.dtype) -> torch.dtype:
    return torch.promote_types(stored, torch.float32)


def _pad(matrix: Float[Tensor, "rows columns"], rank: int, dim: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    if not missing:
        return matrix.contiguous()
    zeros = matrix.new_zeros(*(missing if d == dim else size for d, size in enumerate(matrix.shape)))
    return torch.cat([matrix, zeros], dim)


def _cast(matrix: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None:
        return matrix
    cast = matrix.to(dtype)
    if not torch.isfinite(cast).all():
        raise ValueError(
            f"`dtype` must hold every value; got dtype={dtype} with {float(matrix.abs().max()):.3g} at {name!r}. Take "
            "bfloat16."
        )
    return cast
