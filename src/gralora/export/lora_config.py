"""The config of an exported LoRA: one rank, one integer `lora_alpha`, and the names of the adapted modules."""

from collections import Counter
from typing import Any

from gralora.export.layouts import ExpertsLayout, projections_of
from gralora.files.checkpoint import Adapter
from gralora.files.names import GRALORA_BIAS, LORA_BIAS

# Names of linear layers that transformers 4 had in a mixture and that are parameters now, as PEFT rewrites them.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def common_alpha(adapter: Adapter, rank: int) -> int:
    """Return the `lora_alpha` that states the scale of most layers, or `rank` (a scale of 1) if none is an integer."""
    scales = Counter(layer.scale for layer in adapter.layers.values())
    for scale, _ in scales.most_common():
        alpha = round(scale * rank)
        if alpha > 0 and alpha / rank == scale:
            return alpha
    return rank


def lora_config(adapter: Adapter, rank: int, lora_alpha: int, experts: ExpertsLayout = "stacked") -> dict[str, Any]:
    """Return the fields that programs read, and no field that an older PEFT does not know."""
    config = adapter.config
    task_type = config.task_type
    further = {
        "target_parameters": target_parameters(adapter, experts),
        "trainable_token_indices": config.trainable_token_indices,
        "ensure_weight_tying": config.ensure_weight_tying,
        "layer_replication": config.layer_replication,
    }
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
        "target_modules": target_modules(adapter, experts),
        # PEFT refuses it beside parameters.
        "fan_in_fan_out": config.fan_in_fan_out and not further["target_parameters"],
        "bias": {GRALORA_BIAS: LORA_BIAS}.get(config.bias, config.bias) if adapter.extras else "none",
        "modules_to_save": sorted(config.modules_to_save) if config.modules_to_save else None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    } | {name: value for name, value in further.items() if value}


def target_modules(adapter: Adapter, experts: ExpertsLayout = "stacked") -> list[str]:
    """Return the short names of the adapted modules if these match no other module, else the full names.

    Some programs know only short names. A list of names without exclusions matches the same modules in LoRA as
    in GraLoRA.
    """
    taken = _taken_for_experts(adapter)
    names = [name for name, layer in adapter.layers.items() if layer.record.parameter is None and name not in taken]
    found = _short_names(adapter, adapter.config.target_modules, names)
    if experts == "stacked":
        return found
    stacks = (layer for layer in adapter.layers.values() if layer.experts is not None)
    return sorted({*found, *(name for layer in stacks for name in projections_of(layer))})


def target_parameters(adapter: Adapter, experts: ExpertsLayout = "stacked") -> list[str]:
    """Return the short names of the adapted parameters if these match no other one, else the full names."""
    names = [
        name
        for name, layer in adapter.layers.items()
        if layer.record.parameter is not None and (experts == "stacked" or layer.experts is None)
    ]
    found = _short_names(adapter, adapter.config.target_parameters, names)
    return [*found, *(f"{name}.weight" for name in _taken_for_experts(adapter))]


def _taken_for_experts(adapter: Adapter) -> list[str]:
    """Return the linear layers of a mixture whose names PEFT would take for those of its experts.

    Such as `shared_experts.down_proj`. PEFT (0.21) rewrites such names in `target_modules`, and then adapts the experts
    instead. Named as parameters they keep their meaning, and the keys of their tensors.
    """
    if not any(layer.experts for layer in adapter.layers.values()):
        return []
    return [
        name
        for name, layer in adapter.layers.items()
        if layer.record.kind == "linear" and name.rpartition(".")[2] in _NAMES_OF_EXPERTS
    ]


def _short_names(adapter: Adapter, asked: Any, names: list[str]) -> list[str]:
    config = adapter.config
    exceptions = config.exclude_modules or config.layers_to_transform is not None
    if isinstance(asked, str) or not asked or exceptions:
        return names
    short = {t for t in asked if any(name == t or name.endswith(f".{t}") for name in names)}
    covered = all(any(name == t or name.endswith(f".{t}") for t in short) for name in names)
    return sorted(short) if covered else names
