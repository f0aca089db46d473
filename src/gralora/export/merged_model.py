"""Merging adapters into their base model on disk; the result is a plain transformers model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from gralora import pretrained
from gralora.checks import dtype_named
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import open_adapter
from gralora.tuner.layer import GraloraLayer, gralora_layers
from gralora.tuner.merging.dense_update import delta
from gralora.tuner.merging.quantised import dequantised

_MODEL_MARKS = (("config.json", "*.safetensors"),)
_SAMPLES = 3


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    Attributes:
        base: Folder, hub name or GGUF file of the base model.
        adapters: Folders of the adapters, whose updates are added up.
        output: Folder to write.
        weights: Factor of each adapter's update; all 1 by default.
        dtype: "float32", "bfloat16", "float16", or "auto" for the stored dtype of the base, and bfloat16 for a
            quantised base.
        requantize: Keep the format of a quantised base instead of writing 16-bit weights.
        overwrite: Replace a model at `output`.
    """

    base: str
    adapters: tuple[str, ...]
    output: str
    weights: tuple[float, ...] = ()
    dtype: str = "auto"
    requantize: bool = False
    overwrite: bool = False


@dataclass
class MergeReport:
    """Result of a merge.

    Attributes:
        output: Folder that was written.
        layers: Number of merged layers.
        dtype: Data type of the written weights.
        dequantised: True if the base was quantised and the result is not.
        tokenizer: True if a tokenizer was found and written.
        deviation: Largest difference of a written weight from base + Δ, over the `sampled` layers.
        sampled: Names of the layers that were read back.
        requantisation: Relative error of each layer that was quantised again, against the exact sum.
    """

    output: Path
    layers: int
    dtype: torch.dtype
    dequantised: bool
    tokenizer: bool = True
    deviation: float = 0.0
    sampled: list[str] = field(default_factory=list)
    requantisation: dict[str, float] = field(default_factory=dict)


def merge_to_folder(
    options: MergeOptions, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> MergeReport:
    """Merge adapters into a base model and write it; the output appears only when it is complete.

    Memory: the model in the written dtype, the adapters, and a piece of one layer.

    Args:
        options: Options of the merge.
        on_layer: Called after each layer with the number of merged layers and of all layers.

    Raises:
        FileNotFoundError: The base or an adapter does not exist.
        ValueError: An option breaks its rule, or a file cannot be read.
        RuntimeError: No merged weight was found in what was written.
    """
    weights = _checked_weights(options)
    dense_dtype = dtype_named(options.dtype, auto=torch.bfloat16)
    if options.requantize and options.dtype != "auto":
        raise ValueError(
            "`dtype` must not be given with `requantize`, which keeps the format of the base; got "
            f"dtype={options.dtype!r}."
        )
    adapters = [Path(name) for name in options.adapters]
    for adapter in adapters:
        open_adapter(adapter)
    inputs = (*adapters, *((Path(options.base),) if Path(options.base).exists() else ()))
    output = check_output(options.output, options.overwrite, inputs=inputs, marks=_MODEL_MARKS)
    base = pretrained.resolve(options.base, dense_dtype)
    with _damage_refused(options.base):
        config = AutoConfig.from_pretrained(base.location)
    quantised = getattr(config, "quantization_config", None) is not None
    if options.requantize and not quantised:
        raise ValueError(f"`requantize` needs a quantised base; {options.base!r} is not quantised.")
    with _damage_refused(options.base):
        if quantised:
            model = _load_quantised(base, config, None if options.requantize else dense_dtype)
        else:
            model = _load(config, base, dtype="auto" if options.dtype == "auto" else dense_dtype)
    # Not bare numbers, which PEFT takes for those of layers.
    names = [f"adapter{number}" for number in range(1, len(adapters) + 1)]
    tuned = pretrained.load_adapter(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        tuned.load_adapter(folder, adapter_name=name)
        pretrained.check_places(tuned, folder, name)
    if refusal := _sum_refusal(tuned, names):
        raise ValueError(refusal)
    layers = gralora_layers(tuned.base_model.model)
    for layer in layers.values():
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)
    report = MergeReport(output, len(layers), model.dtype, quantised and not options.requantize)
    samples = _merge_layers(layers, names, options.requantize, report, on_layer)
    plain = tuned.base_model.unload_merged(names)
    with appearing(output) as folder, _config_last(plain, folder):
        plain.save_pretrained(folder)
        report.tokenizer = _save_tokenizer(folder, adapters[0], base.location)
        _compare(folder, plain, samples, report)
    return report


@contextmanager
def _damage_refused(base: str) -> Iterator[None]:
    """Raise what transformers raises on a damaged base model as a ValueError that names it."""
    try:
        yield
    except (
        SafetensorError,
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
    ) as error:
        reason = pretrained.first_sentence(str(error)) or type(error).__name__
        raise ValueError(f"`base` must be a whole model; {base!r} cannot be read: {reason}") from error


@contextmanager
def _config_last(model: Any, folder: Path) -> Iterator[None]:
    """Write `config.json` last, so that the folder of a killed run does not load as a model."""
    config = model.config
    kind = type(config)
    config.__class__ = type(kind.__name__, (kind,), {"save_pretrained": lambda *args, **kwargs: None})
    try:
        yield
    finally:
        config.__class__ = kind
    config.save_pretrained(folder)


def _checked_weights(options: MergeOptions) -> tuple[float, ...]:
    weights = options.weights or (1.0,) * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise ValueError(
            f"`weights` must have one value for each adapter; got {len(weights)} for {len(options.adapters)} adapters."
        )
    return weights


def _model_class(config: Any) -> Any:
    architectures = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    return getattr(transformers, architectures[0], transformers.AutoModelForCausalLM)


def _load(config: Any, base: pretrained.Source, **options: Any) -> Any:
    """Load a base model.

    Raises:
        ValueError: Weights are missing or do not fit.
    """
    model, info = _model_class(config).from_pretrained(
        base.location, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    pretrained.check_other_weights(info, base.name)
    if refusal := pretrained.missing_weights_refusal(info, base.name):
        raise ValueError(refusal)
    return model


def _load_quantised(base: pretrained.Source, config: Any, dense_dtype: torch.dtype | None) -> Any:
    """Return a quantised base model with dense weights in `dense_dtype`, or quantised as it is if that is None."""
    model = _load(config, base)
    if dense_dtype is not None:
        model = model.dequantize().to(dense_dtype)
    # transformers cannot save what it loaded quantised: the conversion that reads packed weights has no inverse.
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not any(type(operation).__name__.endswith("Deserialize") for operation in _operations(conversion))
    ]
    return model


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def _sum_refusal(tuned: PeftModel, names: list[str]) -> str | None:
    """Return why the updates of several adapters cannot be added up, or None."""
    if len(names) == 1:
        return None
    configs: dict[str, Any] = tuned.peft_config
    for number, config in enumerate((configs[name] for name in names), start=1):
        if config.modules_to_save or config.bias != "none" or config.trainable_token_indices:
            return (
                f"Several adapters can be added up only if they hold factors alone; number {number} has whole "
                "modules, biases or tokens of its own. Merge it alone."
            )
    return None


def _merge_layers(
    layers: dict[str, GraloraLayer],
    names: list[str],
    requantize: bool,
    report: MergeReport,
    on_layer: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Merge layer by layer, and return the exact weights of some layers in float32, by name."""
    order = list(layers)
    sampled = {order[i * (len(order) - 1) // max(1, _SAMPLES - 1)] for i in range(_SAMPLES)} if order else set()
    samples = {}
    for number, (name, layer) in enumerate(layers.items(), start=1):
        here = [adapter for adapter in names if adapter in layer.gralora_A]
        exact = _exact(layer, here) if requantize or name in sampled else None
        layer.merge(safe_merge=True, adapter_names=here, keep_base=False)
        if requantize and exact is not None:
            error = dequantised(layer).float() - exact
            report.requantisation[name] = float(error.norm() / exact.norm())
        elif exact is not None:
            weight_name = layer.weight_name(name)
            samples[weight_name if weight_name != name else f"{name}.weight"] = exact
        on_layer(number, len(layers))
    return samples


def _exact(layer: GraloraLayer, names: list[str]) -> Tensor:
    """Return base + Δ in float32, in the shape of the stored weight; of a stack, that of the first matrix alone."""
    ref: Any = layer.weight_ref()
    weight = dequantised(layer) if layer.quantization_backend is not None else ref.parameter.detach()
    if not layer.experts:
        return sum((layer.get_delta_weight(name) for name in names), weight.float())
    updates = (ref.stored(delta([layer.part(name).expert(0)], torch.float32)) for name in names)
    return sum(updates, weight[0].float()).unsqueeze(0)


def _save_tokenizer(folder: Path, adapter: Path, base: str) -> bool:
    """Write the adapter's tokenizer and chat template, which training may have changed, or else the base's.

    Returns:
        Whether a tokenizer was found.
    """
    for source in (adapter, base):
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def _compare(folder: Path, model: Any, samples: dict[str, Tensor], report: MergeReport) -> None:
    """Read the sampled weights back and note the largest deviation from their exact values.

    Raises:
        RuntimeError: None of them was found.
    """
    # Files may name and cut weights otherwise than the model: those of each expert apart, gate and up apart.
    parts = {name: revert_weight_conversion(model, {name: exact}) for name, exact in samples.items()}
    wanted = {key: (name, part) for name, of_sample in parts.items() for key, part in of_sample.items()}
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys() & wanted.keys():
                name, exact = wanted[key]
                written = stored.get_slice(key)[: len(exact)]
                report.deviation = max(report.deviation, float((written.double() - exact.double()).abs().max()))
                found.add(name)
    if samples and not found:
        raise RuntimeError(f"Nothing was written: none of {', '.join(map(repr, samples))} was found in what was saved.")
    report.sampled += [name.removesuffix(".weight") for name in samples if name in found]
