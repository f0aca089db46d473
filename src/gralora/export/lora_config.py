"""The config of an exported LoRA: one rank, one integer `lora_alpha`, and the names of the adapted modules."""

from collections import Counter
from typing import Any

from gralora.export.layouts import HALVES, Experts
from gralora.files.checkpoint import Adapter
from gralora.files.names import GRALORA_BIAS, LORA_BIAS


def common_alpha(adapter: Adapter, rank: int) -> int:
    """Return the `lora_alpha` that states the scale of most layers, or `rank` (a scale of 1) if none is an integer."""
    scales = Counter(layer.scale for layer in adapter.layers.values())
    for scale, _ in scales.most_common():
        alpha = round(scale * rank)
        if alpha > 0 and alpha / rank == scale:
            return alpha
    return rank


def lora_config(adapter: Adapter, rank: int, lora_alpha: int, experts: Experts = "stacked") -> dict[str, Any]:
    """Return the fields that programs read, and no field that an older PEFT does not know.

    Args:
        adapter: Adapter that is exported.
        rank: Rank of every layer.
        lora_alpha: Numerator of the scale.
        experts: How stacks of experts are written.
    """
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
        "target_modules": target_modules(adapter),
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": {GRALORA_BIAS: LORA_BIAS}.get(config.bias, config.bias) if adapter.extras else "none",
        "modules_to_save": sorted(config.modules_to_save) if config.modules_to_save else None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    } | _further(adapter, experts)


def _further(adapter: Adapter, experts: Experts) -> dict[str, Any]:
    """Return the fields that most adapters do without."""
    fields: dict[str, Any] = {}
    if tokens := adapter.config.trainable_token_indices:
        fields["trainable_token_indices"] = tokens
    if adapter.config.ensure_weight_tying:
        fields["ensure_weight_tying"] = True
    stacks = [layer.weight for layer in adapter.layers.values() if layer.kind == "parameter"]
    if experts == "stacked" and stacks:
        fields["target_parameters"] = adapter.config.target_parameters or stacks
    elif stacks:
        halves = {"gate_up_proj": HALVES}
        names = {name.rpartition(".")[2] for name in stacks}
        parts = {part for name in names for part in halves.get(name, (name,))}
        fields["target_modules"] = sorted({*target_modules(adapter), *parts})
    return fields


def target_modules(adapter: Adapter) -> list[str]:
    """Return the short names of the adapted modules if these match no other module, else the full names.

    Some programs know only short names. A list of names without exclusions matches the same modules in LoRA as
    in GraLoRA. Parameters are named elsewhere.
    """
    config, names = adapter.config, [layer.name for layer in adapter.layers.values() if layer.kind != "parameter"]
    exceptions = config.exclude_modules or config.layers_to_transform is not None
    if isinstance(config.target_modules, str) or not config.target_modules or exceptions:
        return names
    short = {t for t in config.target_modules if any(name == t or name.endswith(f".{t}") for name in names)}
    covered = all(any(name == t or name.endswith(f".{t}") for t in short) for name in names)
    return sorted(short) if covered else names
