"""Merging an adapter into its base model on disk: a plain transformers model comes out."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from gralora import pretrained
from gralora.files.atomic import appearing, check_output
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.quantised import dequantised

_MODEL_MARKS = ("config.json",)
_SAMPLES = 3


@dataclass(frozen=True)
class MergeOptions:
    """What to merge into what.

    Attributes:
        base: Folder, hub name or GGUF file of the base model.
        adapters: Folders of adapters; their updates are added up.
        output: Folder to write.
        weights: Factor of each adapter's update; all 1 by default.
        dtype: "float32", "bfloat16", "float16", or "auto": as the base is stored, bfloat16 for a quantised one.
        requantize: Keep the format of a quantised base, instead of writing 16-bit weights.
        overwrite: Replace a model that is at `output`.
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
    """What came out.

    Attributes:
        output: The folder.
        layers: How many layers were merged.
        dtype: Of the weights written.
        dequantised: The base was quantised and the result is not.
        deviation: Largest difference of a written weight from base + Δ, over `sampled` layers.
        sampled: Names of the layers that were read back.
        requantisation: Relative error of each merged layer against the exact sum, where it was quantised again.
    """

    output: Path
    layers: int
    dtype: torch.dtype
    dequantised: bool
    deviation: float = 0.0
    sampled: list[str] = field(default_factory=list)
    requantisation: dict[str, float] = field(default_factory=dict)


def merge_to_folder(
    options: MergeOptions, on_layer: Callable[[int, int], None] = lambda done, total: None
) -> MergeReport:
    """Merge adapters into a base model and write it, whole or not at all.

    Memory: the model in the dtype that is written, the adapters, and a piece of one layer.

    Args:
        options: What to merge.
        on_layer: Called after each layer with how many are done, and of how many.

    Raises:
        ValueError: An option that breaks its rule, or a file that can't be read.
    """
    weights = _checked_weights(options)
    adapters = [_adapter_folder(name) for name in options.adapters]
    inputs = (*adapters, *((Path(options.base),) if Path(options.base).exists() else ()))
    output = check_output(options.output, options.overwrite, inputs=inputs, marks=_MODEL_MARKS)
    base = pretrained.resolve(options.base, pretrained.DTYPES.get(options.dtype, torch.bfloat16))
    config = AutoConfig.from_pretrained(base.location)
    quantised = getattr(config, "quantization_config", None) is not None
    if options.requantize and not quantised:
        raise ValueError(f"`requantize` needs a quantised base; {options.base!r} is not quantised.")
    model = _load(base, config, options.dtype, keep_quantised=options.requantize)
    tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], start=1):
        tuned.load_adapter(folder, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    _check_extras(tuned, names)
    layers = {name: m for name, m in tuned.base_model.model.named_modules() if isinstance(m, GraloraLayer)}
    for layer in layers.values():
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)
    report = MergeReport(output, len(layers), model.dtype, quantised and not options.requantize)
    samples = _merge_layers(layers, names, options.requantize, report, on_layer)
    plain = tuned.base_model.unload_merged(names)
    with appearing(output) as folder, _config_last(plain, folder):
        plain.save_pretrained(folder)
        _save_tokenizer(folder, adapters[0], base.location)
        _compare(folder, samples, report)
    return report


@contextmanager
def _config_last(model: Any, folder: Path) -> Iterator[None]:
    """Write `config.json` when all else is written: a folder that a killed run leaves is then no model to anybody."""
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
            f"`weight` must be given once for each adapter; got {len(weights)} for {len(options.adapters)} adapters."
        )
    if options.dtype != "auto" and options.dtype not in pretrained.DTYPES:
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16'; got dtype={options.dtype!r}.")
    return weights


def _adapter_folder(name: str) -> Path:
    folder = Path(name)
    try:
        kind = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"`adapter` must be a folder with an adapter_config.json; {name!r}: {error}") from None
    if kind != "GRALORA":
        raise ValueError(f"`adapter` must be a GraLoRA adapter; {name!r} is of type {kind!r}.")
    return folder


def _load(base: pretrained.Source, config: Any, dtype: str, keep_quantised: bool) -> Any:
    """Return the base model; a quantised one as dense 16-bit weights, unless it is to stay quantised."""
    architectures = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    model_class = getattr(transformers, architectures[0], transformers.AutoModelForCausalLM)
    wanted = pretrained.DTYPES.get(dtype)
    quantised = getattr(config, "quantization_config", None) is not None
    if not quantised:
        return model_class.from_pretrained(base.location, dtype=wanted or "auto")
    model = model_class.from_pretrained(base.location)
    if not keep_quantised:
        model = model.dequantize().to(wanted or torch.bfloat16)
    # transformers can't save what it loaded quantised: what reads packed weights has no inverse.
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not any(type(operation).__name__.endswith("Deserialize") for operation in _operations(conversion))
    ]
    return model


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def _check_extras(tuned: PeftModel, names: list[str]) -> None:
    if len(names) == 1:
        return
    for name, config in ((name, tuned.peft_config[name]) for name in names):
        if config.modules_to_save or config.bias != "none" or config.trainable_token_indices:
            raise ValueError(
                "several adapters can be added up only where they are updates alone; number "
                f"{int(name) + 1} has whole modules, biases or tokens of its own. Merge it alone."
            )


def _merge_layers(
    layers: dict[str, GraloraLayer],
    names: list[str],
    requantize: bool,
    report: MergeReport,
    on_layer: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Merge layer by layer, and return what some of them should be, in float32."""
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
            samples[name] = exact
        on_layer(number, len(layers))
    return samples


def _exact(layer: GraloraLayer, names: list[str]) -> Tensor:
    quantised = layer.quantization_backend is not None
    weight = dequantised(layer) if quantised else layer.get_base_layer().weight.detach()
    total = weight.float()
    for name in names:
        total = total + layer.get_delta_weight(name)
    return total


def _save_tokenizer(folder: Path, adapter: Path, base: str) -> None:
    """Write the tokenizer and its chat template: the adapter's, which training may have changed, or the base's."""
    for source in (adapter, base):
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            return
        except (OSError, ValueError, KeyError):
            continue


def _compare(folder: Path, samples: dict[str, Tensor], report: MergeReport) -> None:
    """Read some of the written weights back and note the largest deviation from what they should be."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in set(stored.keys()) & {f"{name}.weight" for name in samples}:
                name = key.removesuffix(".weight")
                difference = (stored.get_tensor(key).double() - samples[name].double()).abs().max()
                report.deviation = max(report.deviation, float(difference))
                report.sampled.append(name)
