# pyright: strict
"""Names of files and of tensors in adapter checkpoints.

A key of a checkpoint is a prefix, the name of a module in the base model and the name of a factor:
`base_model.model.` + `model.layers.0.self_attn.q_proj` + `.gralora_A`.
"""

import re
from collections.abc import Iterable

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

PREFIX = "base_model.model."
# In the order of `blocks.Factors`; an adapter without a hybrid part has the first two.
GRALORA_FACTORS = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
LORA_FACTORS = ("lora_A.weight", "lora_B.weight")
LORA_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")

# Values of `bias` that train the biases of adapted layers alone, in a LoRA's config and in GraLoRA's.
LORA_BIAS, GRALORA_BIAS = "lora_only", "gralora_only"

# Components of a diffusers pipeline, whose names replace PREFIX in a file for diffusers.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_UNET_MODULES = ("down_blocks.", "up_blocks.", "mid_block.")


def key_of(module: str, factor: str, prefix: str = PREFIX) -> str:
    """Return the key of one factor.

    Example:
        >>> key_of("layers.0.q_proj", "lora_A.weight")
        'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    return f"{prefix}{module}.{factor}"


def split_key(key: str, factors: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the module and the factor of a key, or None if it ends in none of `factors`.

    Example:
        >>> split_key("base_model.model.layers.0.q_proj.gralora_A", GRALORA_FACTORS)
        ('layers.0.q_proj', 'gralora_A')
    """
    for factor in factors:
        if key.endswith(f".{factor}"):
            return module_name(key.removesuffix(f".{factor}")), factor
    return None


def group_keys(keys: Iterable[str], factors: tuple[str, ...]) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Return the keys of the factors of each module, and all other keys, both in natural order."""
    by_module: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for key in keys:
        if split := split_key(key, factors):
            by_module.setdefault(split[0], {})[split[1]] = key
        else:
            others.append(key)
    return {module: by_module[module] for module in sorted(by_module, key=natural_order)}, tuple(
        sorted(others, key=natural_order)
    )


def module_name(key: str) -> str:
    """Return `key` without the prefixes that PEFT and torch.compile add."""
    return key.removeprefix(PREFIX).replace("_orig_mod.", "")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def component_of(modules: Iterable[str]) -> str:
    """Return "unet" if `modules` have the names of a UNet's, else "transformer"."""
    return "unet" if any(module.startswith(_UNET_MODULES) for module in modules) else "transformer"
