"""LoRA to GraLoRA: a start for training on with more freedom, at exactly the same map."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gralora.files.adapter_folder import AdapterFolder
from gralora.files.atomic import check_output
from gralora.files.checkpoint import (
    PREFIX,
    TensorFile,
    Tensors,
    config_from,
    module_name,
    natural_order,
    read_config,
    read_model,
    tensor_path,
)
from gralora.tuner import blocks
from gralora.tuner.blocks import Factors
from gralora.tuner.config import GraloraConfig, divisors

# Fields of LoRA that change the map, with the value at which they do not.
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
    """Turn a LoRA adapter into a GraLoRA adapter that is the same map, *exact* but for the rounding of its scale.

    Block (i, j) of `B·A` is `B_i A_j`, of rank q. So with s = q, that is r = k·q, every pair of blocks takes
    `A[j][:, i-th slice] = A_jᵀ` and `B[i][j-th slice, :] = B_iᵀ`, and is free to move on its own from there.

    Args:
        source: Folder of a LoRA adapter of rank q, or a model that carries one.
        output: Folder to write; None to leave it in memory.
        k: Blocks per side.
        hybrid: Keep the LoRA as the hybrid part instead, `hybrid_r = q`, with new blocks at zero beside it.
        r: Rank of the new blocks with `hybrid`; by default the smallest multiple of k that is at least q.
        overwrite: Replace an adapter at `output`.
        adapter_name: Which adapter of a model.

    Raises:
        FileNotFoundError: `source` is no folder of an adapter.
        ValueError: It is no plain LoRA, or `k` does not divide the widths of a layer.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"`k` must be a positive integer; got k={k!r}.")
    if r is not None and not hybrid:
        raise ValueError(f"`r` must come with `hybrid`: without it the rank is k·q; got r={r!r}.")
    inputs = () if isinstance(source, nn.Module) else (Path(source),)
    path = None if output is None else check_output(output, overwrite, inputs)
    config, tensors, where = _open(source, adapter_name)
    _check_plain(config, where)
    settings = _hybrid_settings(config, k, r) if hybrid else _block_settings(config, k)
    settings["gralora_k"] = k
    pairs, extras = _pairs(tensors, where)
    new = _gralora_config(config, settings, Path(where))
    written: dict[str, Tensor] = {}
    for name in sorted(pairs, key=natural_order):
        lora_a, lora_b = (tensors.read(pairs[name][letter]) for letter in "AB")
        _check_pair(lora_a, lora_b, k, name, where)
        settled = new.settings_for(name)
        if lora_a.shape[0] != (q := settled.hybrid_r if hybrid else settled.r // k):
            raise ValueError(f"The LoRA at {name!r} must be of rank {q}, as its config says; got {lora_a.shape[0]}.")
        factors = _beside(lora_a, lora_b, k, settled.r) if hybrid else _split(lora_a, lora_b, k)
        keys = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
        for key, tensor in zip(keys, factors, strict=True):
            if tensor is not None:
                written[f"{PREFIX}{name}.{key}"] = tensor.contiguous()
    written |= {key: tensors.read(key) for key in extras}
    adapter = AdapterFolder(new.to_dict(), written)
    if path is not None:
        adapter.save(path, overwrite)
    return adapter


def _open(source: str | Path | nn.Module, adapter_name: str) -> tuple[dict[str, Any], Tensors, str]:
    if isinstance(source, nn.Module):
        config, tensors = read_model(source, adapter_name)
        return config.to_dict(), tensors, type(source).__name__
    folder = Path(source)
    return read_config(folder), TensorFile(tensor_path(folder)), str(folder)


def _check_plain(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where!r} must hold a LoRA adapter; its config says peft_type={config.get('peft_type')!r}.")
    for name in _MUST_BE_OFF:
        if config.get(name):
            raise ValueError(
                f"`{name}` must not be used in a LoRA to be converted; got {name}={config[name]!r} in {where!r}."
            )


def _block_settings(config: dict[str, Any], k: int) -> dict[str, Any]:
    # alpha / (k·q) is LoRA's alpha / q; with rsLoRA both are roots.
    factor = math.sqrt(k) if config.get("use_rslora") else k
    return {
        "r": k * config["r"],
        "alpha": factor * config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": {name: k * q for name, q in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _hybrid_settings(config: dict[str, Any], k: int, r: int | None) -> dict[str, Any]:
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ValueError(
                f"`hybrid` must be off for a LoRA with `{name}`, since `hybrid_r` is one for all layers; got "
                f"{name}={config[name]!r}."
            )
    q = config["r"]
    r = k * math.ceil(q / k) if r is None else r
    scale = config["lora_alpha"] / (math.sqrt(q) if config.get("use_rslora") else q)
    return {"r": r, "hybrid_r": q, "alpha": scale * (r + q)}


def _gralora_config(config: dict[str, Any], settings: dict[str, Any], where: Path) -> GraloraConfig:
    kept = (
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
    taken = {name: config[name] for name in kept if config.get(name) is not None}
    bias = {"lora_only": "gralora_only"}.get(config.get("bias", "none"), config.get("bias", "none"))
    return config_from(
        taken | settings | {"bias": bias, "gralora_dropout": config.get("lora_dropout", 0.0), "inference_mode": True},
        where,
    )


def _pairs(tensors: Tensors, where: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    pairs: dict[str, dict[str, str]] = {}
    extras = []
    for key in tensors.keys():  # noqa: SIM118, it is no dict
        for letter in "AB":
            if key.endswith(ending := f".lora_{letter}.weight"):
                pairs.setdefault(module_name(key.removesuffix(ending)), {})[letter] = key
                break
        else:
            if ".lora_" in key:
                raise ValueError(f"A LoRA to be converted must adapt linear layers alone; got {key!r} in {where!r}.")
            extras.append(key)
    if not pairs or any(len(pair) != 2 for pair in pairs.values()):
        raise ValueError(f"{where!r} must hold `lora_A` and `lora_B` of every adapted module.")
    return pairs, extras


def _check_pair(lora_a: Tensor, lora_b: Tensor, k: int, name: str, where: str) -> None:
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"A LoRA to be converted must have matrices of one rank; got shapes {list(lora_a.shape)} and "
            f"{list(lora_b.shape)} at {name!r} in {where!r}."
        )
    if not (torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        raise ValueError(f"The LoRA at {name!r} must be finite; it holds nan or inf in {where!r}.")
    widths = lora_a.shape[1], lora_b.shape[0]
    if widths[0] % k or widths[1] % k:
        fitting = ", ".join(map(str, divisors(math.gcd(*widths))))
        raise ValueError(
            f"`k` must divide in_features={widths[0]} and out_features={widths[1]} at {name!r}; got k={k}. Values that "
            f"fit: {fitting}."
        )


def _split(lora_a: Float[Tensor, "q in"], lora_b: Float[Tensor, "out q"], k: int) -> Factors:
    A = lora_a.T.unflatten(0, (k, -1)).repeat(1, 1, k)
    B = lora_b.unflatten(0, (k, -1)).mT.repeat(1, k, 1)
    return Factors(A, B)


def _beside(lora_a: Float[Tensor, "q in"], lora_b: Float[Tensor, "out q"], k: int, r: int) -> Factors:
    A = lora_a.new_empty(k, lora_a.shape[1] // k, r)
    B = lora_b.new_empty(k, r, lora_b.shape[0] // k)
    blocks.initialise_(Factors(A, B), identity=True)
    return Factors(A, B, lora_a, lora_b)
