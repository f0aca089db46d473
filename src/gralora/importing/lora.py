"""LoRA to GraLoRA: the equivalent adapter, as a start for further training."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gralora.checks import is_number, require_integer
from gralora.files.adapter_config import config_from, read_config, require_peft_type
from gralora.files.adapter_folder import AdapterFolder
from gralora.files.atomic import check_output
from gralora.files.checkpoint import folders_read, open_tensors, read_model
from gralora.files.names import GRALORA_BIAS, GRALORA_FACTORS, LORA_BIAS, LORA_FACTORS, group_keys, key_of
from gralora.files.tensors import Tensors
from gralora.tuner.blocks import Factors
from gralora.tuner.config import GraloraConfig, divisors
from gralora.tuner.initialise import zero_update_

# Fields of LoRA's config that change the update; all must be off.
_MUST_BE_OFF = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Fields that mean the same in both configs.
_KEPT = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
)


def from_lora(
    source: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    k: int = 2,
    hybrid: bool = False,
    r: int | None = None,
    overwrite: bool = False,
    adapter_name: str = "default",
) -> AdapterFolder:
    """Convert a LoRA adapter to an equivalent GraLoRA adapter, *exact* but for the rounding of its scale.

    Block (i, j) of `B·A` is `B_i A_j`, of the LoRA's rank. So with s equal to that rank, and r = k·s, every pair of
    blocks gets `A[j][:, i-th slice] = A_jᵀ` and `B[i][j-th slice, :] = B_iᵀ`. Further training can then change each
    pair independently.

    Args:
        source: Folder of a LoRA adapter, or a model that carries one.
        output: Folder to write; None keeps the result in memory.
        k: Blocks per side.
        hybrid: Keep the LoRA as the hybrid part instead, with `hybrid_r` equal to its rank, and add new blocks that
            start at zero.
        r: Rank of the new blocks with `hybrid`; None is the smallest multiple of k that is at least the LoRA's rank.
        overwrite: Replace an adapter at `output`.
        adapter_name: Name of the adapter on a model.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: The adapter is not a plain LoRA, or `k` does not divide the widths of a layer.
    """
    require_integer("k", k)
    if r is not None and not hybrid:
        raise ValueError(f"`r` must come with `hybrid`: without it, it is k times the LoRA's rank; got r={r!r}.")
    if r is not None:
        require_integer("r", r)
        if r % k:
            raise ValueError(f"`k` must divide `r`; got k={k} with r={r}.")
    path = None if output is None else check_output(output, overwrite, folders_read(source))
    config, tensors, where = _open(source, adapter_name)
    require_peft_type(config, "LORA", where)
    if refusal := _field_refusal(config, where) or _rank_refusal(config, where):
        raise ValueError(refusal)
    settings = _hybrid_settings(config, k, r) if hybrid else _block_settings(config, k)
    settings["gralora_k"] = k
    pairs, extras = _pairs(tensors, where)
    new = _gralora_config(config, settings, where)
    written: dict[str, Tensor] = {}
    for name, keys in pairs.items():
        lora_a, lora_b = (tensors.read(keys[factor]) for factor in LORA_FACTORS)
        if refusal := _pair_refusal(lora_a, lora_b, k, name, where):
            raise ValueError(refusal)
        layer_settings = new.settings_for(name)
        rank = layer_settings.hybrid_r if hybrid else layer_settings.r // k
        if lora_a.shape[0] != rank:
            raise ValueError(f"The LoRA at {name!r} must be of rank {rank}, as its config says; got {lora_a.shape[0]}.")
        factors = _beside(lora_a, lora_b, k, layer_settings.r) if hybrid else _split(lora_a, lora_b, k)
        for factor, tensor in zip(GRALORA_FACTORS, factors, strict=True):
            if tensor is not None:
                written[key_of(name, factor)] = tensor.contiguous()
    written |= {key: tensors.read(key) for key in extras}
    adapter = AdapterFolder(new.to_dict(), written)
    if path is not None:
        adapter.save(path, overwrite)
    return adapter


def _open(source: str | Path | nn.Module, adapter_name: str) -> tuple[dict[str, Any], Tensors, str]:
    if isinstance(source, nn.Module):
        config, tensors, where = read_model(source, adapter_name)
        return config.to_dict(), tensors, where
    return read_config(source), open_tensors(source), str(source)


def _field_refusal(config: dict[str, Any], where: str) -> str | None:
    """Return which field of LoRA's config has no counterpart, or None."""
    for name in _MUST_BE_OFF:
        if config.get(name):
            return f"`{name}` must not be used in a LoRA to be converted; got {name}={config[name]!r} in {where!r}."
    return None


def _rank_refusal(config: dict[str, Any], where: str) -> str | None:
    """Return why the ranks and alphas of LoRA's config cannot be used, or None."""
    ranks = {"r": config.get("r"), **(config.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            return f"The config of {where!r} must have a positive integer as rank {name!r}; got {rank!r}."
    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    for name, alpha in alphas.items():
        if not is_number(alpha):
            return f"The config of {where!r} must have a number as alpha {name!r}; got {alpha!r}."
    return None


def _block_settings(config: dict[str, Any], k: int) -> dict[str, Any]:
    # r grows k times, so alpha does too; with rsLoRA the scale is alpha / √r.
    factor = math.sqrt(k) if config.get("use_rslora") else k
    return {
        "r": k * config["r"],
        "alpha": factor * config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": {name: k * rank for name, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _hybrid_settings(config: dict[str, Any], k: int, r: int | None) -> dict[str, Any]:
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ValueError(
                f"`hybrid` must be off for a LoRA with `{name}`, since `hybrid_r` is one for all layers; got "
                f"{name}={config[name]!r}."
            )
    hybrid_r = config["r"]
    r = k * math.ceil(hybrid_r / k) if r is None else r
    scale = config["lora_alpha"] / (math.sqrt(hybrid_r) if config.get("use_rslora") else hybrid_r)
    return {"r": r, "hybrid_r": hybrid_r, "alpha": scale * (r + hybrid_r)}


def _gralora_config(config: dict[str, Any], settings: dict[str, Any], where: str) -> GraloraConfig:
    kept = {name: config[name] for name in _KEPT if config.get(name) is not None}
    bias = config.get("bias", "none")
    bias = GRALORA_BIAS if bias == LORA_BIAS else bias
    return config_from(
        kept | settings | {"bias": bias, "gralora_dropout": config.get("lora_dropout", 0.0), "inference_mode": True},
        where,
    )


def _pairs(tensors: Tensors, where: str) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Return the keys of both factors of each module, and the keys of everything else that was trained."""
    pairs, extras = group_keys(tensors.keys(), LORA_FACTORS)
    for key in extras:
        if ".lora_" in key:
            raise ValueError(f"A LoRA to be converted must adapt linear layers alone; got {key!r} in {where!r}.")
    if not pairs or any(len(pair) != 2 for pair in pairs.values()):
        raise ValueError(f"{where!r} must hold `lora_A` and `lora_B` of every adapted module.")
    return pairs, extras


def _pair_refusal(lora_a: Tensor, lora_b: Tensor, k: int, name: str, where: str) -> str | None:
    """Return why the LoRA of one layer cannot be converted, or None."""
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        return (
            f"A LoRA to be converted must have matrices of one rank; got shapes {list(lora_a.shape)} and "
            f"{list(lora_b.shape)} at {name!r} in {where!r}."
        )
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        return f"The LoRA at {name!r} must be finite; it holds nan or inf in {where!r}."
    widths = lora_a.shape[1], lora_b.shape[0]
    if widths[0] % k or widths[1] % k:
        fitting = ", ".join(map(str, divisors(math.gcd(*widths))))
        return (
            f"`k` must divide in_features={widths[0]} and out_features={widths[1]} at {name!r}; got k={k}. Values that "
            f"fit: {fitting}."
        )
    return None


def _split(lora_a: Float[Tensor, "rank in"], lora_b: Float[Tensor, "out rank"], k: int) -> Factors:
    """Give every pair of blocks the LoRA's rows and columns of its own block."""
    A = lora_a.T.unflatten(0, (k, -1)).repeat(1, 1, k)
    B = lora_b.unflatten(0, (k, -1)).mT.repeat(1, k, 1)
    return Factors(A, B)


def _beside(lora_a: Float[Tensor, "rank in"], lora_b: Float[Tensor, "out rank"], k: int, r: int) -> Factors:
    """Keep the LoRA as the hybrid part, with new blocks whose update is zero."""
    A = lora_a.new_empty(k, lora_a.shape[1] // k, r)
    B = lora_b.new_empty(k, r, lora_b.shape[0] // k)
    zero_update_(Factors(A, B))
    return Factors(A, B, lora_a, lora_b)
