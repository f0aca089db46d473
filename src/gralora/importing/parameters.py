"""Which parameter of which module a LoRA made with `target_parameters` adapts: its file alone does not say it.

PEFT's LoRA on several parameters of a module has a layer for each, around one another, so that the keys of all but the
last one have `.base_layer`. The file does not name the parameters; the config does, but not in the order of the layers.
The order is that of the module's parameters, which is known for the experts of transformers.
"""

import re
from typing import Any

from gralora.files.layer_record import LayerRecord

# Parameters of experts, in the order in which modules of transformers have them.
_ORDER = ("gate_up_proj", "up_proj", "down_proj")
_MODULE_OF_ONE_EXPERT = re.compile(r"\bexperts\.\d+\.\w+$")


def parameters_of(modules: list[str], config: dict[str, Any], where: str) -> dict[str, LayerRecord]:
    """Return what each of `modules` that adapts a parameter is, by the names in the keys.

    Args:
        modules: Names of all adapted modules, with `.base_layer` where layers lie around each other.
        config: Fields of the LoRA's config.
        where: Folder or model of the LoRA, for messages.

    Raises:
        ValueError: It cannot be told which parameters of a module are adapted.
    """
    targets: list[str] = sorted(config.get("target_parameters") or ())
    layers: dict[str, list[str]] = {}
    for module in sorted(modules, key=len, reverse=True):  # the innermost first
        holder = re.sub(r"(\.base_layer)+$", "", module)
        if ".base_layer" in holder:
            raise ValueError(
                f"A LoRA of attention modules cannot be converted; got {module!r} in {where!r}. Merge it with PEFT."
            )
        layers.setdefault(holder, []).append(module)
    found: dict[str, LayerRecord] = {}
    for holder, nested in layers.items():
        named = {
            t.rpartition(".")[2] for t in targets if "." in t and f".{holder}".endswith(f".{t.rpartition('.')[0]}")
        }
        if not named and len(nested) == 1 and _is_module(holder, config):
            continue
        others = {t for t in targets if "." not in t}
        parameters = named if len(named) == len(nested) else named | others
        if len(parameters) != len(nested) or (len(nested) > 1 and not parameters <= set(_ORDER)):
            raise ValueError(
                f"`target_parameters` must name the {len(nested)} adapted parameters of {holder!r}, and several only "
                f"of experts ({', '.join(_ORDER)}); got {targets} in {where!r}."
            )
        ordered = sorted(parameters, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)
        for module, parameter in zip(nested, ordered, strict=True):
            found[module] = LayerRecord("parameter", parameter, partial=True)
    return found


def old_experts_refusal(modules: list[str], where: str) -> str | None:
    """Return why the LoRA cannot be converted, if it adapts linear layers of single experts, or None."""
    old = next((module for module in modules if _MODULE_OF_ONE_EXPERT.search(module)), None)
    if old is None:
        return None
    return (
        f"A LoRA to be converted must be one for transformers 5; {where!r} adapts {old!r}, a layer of a single expert, "
        "as in transformers 4. Load it on its base model with PEFT, which fuses the experts, save it with "
        "`save_pretrained`, and convert that."
    )


def _is_module(name: str, config: dict[str, Any]) -> bool:
    """Return whether `target_modules` may mean the module: it does, or there is no list to tell."""
    targets = config.get("target_modules")
    if targets is None or isinstance(targets, str):
        return not config.get("target_parameters") or (isinstance(targets, str) and bool(re.fullmatch(targets, name)))
    return not config.get("target_parameters") or any(name == t or name.endswith(f".{t}") for t in targets)
