"""Names that the experts of a mixture had in transformers 4, where each was a module of linear layers of its own.

In transformers 5 the weights of all experts are one parameter, and those of gate and up are fused. PEFT rewrites the
targets of a LoRA config; the same is done here for ours.
"""

import re
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import transformers_weight_conversion as conversion
from torch import nn

from gralora.tuner.config import GraloraConfig
from gralora.tuner.experts import expert_stacks

# A key of a checkpoint with the weights of one expert: `….experts.3.w1.gralora_A`.
_KEY_OF_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.\w+\.gralora_")
_MODULE_OF_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.\w+$")


def rewrite_targets(config: GraloraConfig, model: nn.Module, model_type: str | None) -> None:
    """Add to `target_parameters` of `config` what its `target_modules` mean in models of transformers 4.

    A rank of the two weights that are fused becomes twice the rank of one, at the same scale. Names that modules have
    too stay in `target_modules`. `"all-linear"` is left alone, since it finds the experts itself, and so is a config
    that was resolved when an adapter was put on.

    Raises:
        ValueError: Only one of two weights that are fused is named.
    """
    base_type: Any = vars(conversion)["_MODEL_TO_CONVERSION_PATTERN"].get(model_type)
    renamed = conversion._MOE_TARGET_MODULE_MAPPING.get(base_type)
    asked = config.target_modules
    if not renamed or not asked or config.asks_for_all_linear or config.layer_kinds:
        return
    stacks = {
        f"{name}.{stack}"
        for name, module in model.named_modules()
        for stack in expert_stacks(module)
        if not any(
            isinstance(check_target_module_exists(config, n), _ExcludedModule) for n in (name, f"{name}.{stack}")
        )
    }
    containers = {stack.rpartition(".")[0] for stack in stacks}
    modules = dict(model.named_modules())
    routers = {name for name, module in modules.items() if _is_router(module)}
    found: dict[str, set[str]] = {}  # new name to the old names that were asked for
    if isinstance(asked, str):
        for old, new in renamed.items():
            if any(re.fullmatch(asked, f"{container}.{old}") for container in containers):
                found.setdefault(new, set()).add(old)
    else:
        former = {f"{container}.{old}": old for container in containers for old in renamed}
        former |= {name: old for name in routers if (old := name.rpartition(".")[2]) in renamed}
        for target in asked:
            for old in {old for name, old in former.items() if name == target or name.endswith(f".{target}")}:
                found.setdefault(renamed[old], set()).add(old)
    names = modules.keys() - routers
    parameters = {*stacks, *(f"{router}.weight" for router in routers)}
    found = {new: old for new, old in found.items() if any(p.endswith(f".{new}") for p in parameters)}
    if not found:
        return
    for new, parts in conversion._MOE_FUSED_TARGETS[base_type].items():
        given = found.get(new, set())
        if given and (missing := sorted(set(parts) - given)):
            raise ValueError(
                f"`target_modules` must name all of {sorted(parts)}, whose weights are one parameter {new!r} in "
                f"transformers 5; {', '.join(map(repr, missing))} is missing."
            )
        if given:
            pattern = rf".*\.experts\.{new}"
            config.rank_pattern = {pattern: len(parts) * config.r} | (config.rank_pattern or {})
            config.alpha_pattern = {pattern: len(parts) * config.alpha} | (config.alpha_pattern or {})
    config.target_parameters = sorted({*(config.target_parameters or ()), *found})
    if isinstance(asked, set):
        of_modules = {t for t in asked if any(name == t or name.endswith(f".{t}") for name in names)}
        config.target_modules = {t for t in asked if t in of_modules or t.rpartition(".")[2] not in renamed}  # pyright: ignore[reportAttributeAccessIssue]
    elif not any(re.fullmatch(asked, name) for name in names):
        config.target_modules = set()  # pyright: ignore[reportAttributeAccessIssue]


def _is_router(module: nn.Module) -> bool:
    """Return whether a module has a weight and is no linear layer, as the routers of transformers 5."""
    return "weight" in module._parameters and not isinstance(module, nn.Linear)


def parameters_to_name(model: nn.Module) -> list[str]:
    """Return names for `target_parameters` that mean all stacks of experts in `model`."""
    return sorted(
        {
            f"{name.rpartition('.')[2]}.{stack}"
            for name, module in model.named_modules()
            for stack in expert_stacks(module)
        }
    )


def checkpoint_refusal(keys: list[str], model: nn.Module) -> str | None:
    """Return why a checkpoint with adapters on the linear layers of each expert does not fit `model`, or None."""
    old = next((key for key in keys if _KEY_OF_ONE_EXPERT.search(key)), None)
    if old is None or any(_MODULE_OF_ONE_EXPERT.search(name) for name, _ in model.named_modules()):
        return None
    return (
        f"the adapter was made with transformers 4, where every expert was a module of its own ({old!r}); the experts "
        "are one parameter now. Merge it with transformers 4, or train a new one."
    )
