"""LoRA to GraLoRA: the equivalent adapter, as a start for further training."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gralora.checks import is_number, require_integer
from gralora.files.adapter_config import config_from, read_config, require_peft_type
from gralora.files.adapter_folder import AdapterFolder
from gralora.files.atomic import check_output
from gralora.files.checkpoint import folders_read, open_tensors, read_model
from gralora.files.layer_record import LayerRecord
from gralora.files.names import GRALORA_BIAS, GRALORA_FACTORS, LORA_BIAS, LORA_FACTORS, group_keys, key_of
from gralora.files.tensors import Tensors
from gralora.importing.parameters import old_experts_refusal, parameters_of
from gralora.tuner.blocks import Factors, factor_shapes
from gralora.tuner.config import GraloraConfig, divisors
from gralora.tuner.initialise import zero_update_

# Fields of LoRA's config that change the update; all must be off.
_MUST_BE_OFF = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_UNMARKED = {"transposed": True, "unmarked": True, "partial": True}
# Fields that mean the same in both configs.
_KEPT = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "target_parameters",
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
    pair independently. The LoRA may adapt linear layers, and parameters and experts by `target_parameters`.

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
    if not isinstance(source, nn.Module) and (refusal := old_experts_refusal(list(pairs), where)):
        raise ValueError(refusal)
    records = parameters_of(list(pairs), config, where)
    new = _gralora_config(config, settings, where)
    written: dict[str, Tensor] = {}
    loras: dict[str, _Lora] = {}
    for module, keys in pairs.items():
        lora = _Lora.read(tensors, keys, module, records.get(module))
        layer_settings = new.settings_for(lora.name)
        rank = layer_settings.hybrid_r if hybrid else layer_settings.r // k
        if refusal := _pair_refusal(lora, where):
            raise ValueError(refusal)
        loras[module] = lora.unstacked(rank)
    loras = _oriented(loras)
    for module, lora in loras.items():
        if refusal := _width_refusal(lora, k):
            raise ValueError(refusal)
        r = new.settings_for(lora.name).r
        factors = _beside(lora.a, lora.b, k, r) if hybrid else _split(lora.a, lora.b, k)
        for factor, tensor in zip(GRALORA_FACTORS, factors, strict=True):
            if tensor is not None:
                written[key_of(module, factor)] = tensor.contiguous()
    new.layer_kinds = {module: lora.record.to_dict() for module, lora in loras.items() if lora.record} or None
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


class _Lora(NamedTuple):
    """The LoRA of one weight: `a` is `[*experts, rank, in]`, `b` is `[*experts, out, rank]`.

    Attributes:
        name: Name of the module, or of the parameter.
        a: `lora_A`.
        b: `lora_B`.
        record: What the weight is; None for a linear layer.
    """

    name: str
    a: Tensor
    b: Tensor
    record: LayerRecord | None

    @classmethod
    def read(cls, tensors: Tensors, keys: dict[str, str], module: str, record: LayerRecord | None) -> "_Lora":
        """Read the tensors of one layer as they are in the file, where those of experts are laid out as matrices."""
        a, b = (tensors.read(keys[factor]) for factor in LORA_FACTORS)
        holder = re.sub(r"(\.base_layer)+$", "", module)
        return cls(f"{holder}.{record.parameter}" if record else module, a, b, record)

    def unstacked(self, rank: int) -> "_Lora":
        """Return the LoRA of each expert, where there are several, of the given rank.

        Raises:
            ValueError: The LoRA is not of that rank.
        """
        rows = self.a.shape[0]
        if rows != rank and (self.record is None or rows % rank):
            raise ValueError(f"The LoRA at {self.name!r} must be of rank {rank}, as its config says; got {rows}.")
        if rows == rank:
            return self
        return self._replace(a=self.a.unflatten(0, (-1, rank)), b=self.b.unflatten(1, (rank, -1)).permute(2, 0, 1))

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of input and output."""
        return self.a.shape[-1], self.b.shape[-2]


def _oriented(loras: dict[str, _Lora]) -> dict[str, _Lora]:
    """Return `loras` with those of experts transposed where PEFT took their input for their output.

    It does so in modules that store their matrices as `[in, out]` without saying so. The output of gate and up is twice
    as wide as the input of down.
    """
    oriented = dict(loras)
    for module, down in loras.items():
        up = loras.get(f"{module}.base_layer")
        if up is None or up.name.rpartition(".")[2] != "gate_up_proj" or up.widths[1] == 2 * down.widths[0]:
            continue
        if up.widths[0] == 2 * down.widths[1]:
            for name, lora in ((module, down), (f"{module}.base_layer", up)):
                record = LayerRecord("parameter", lora.record and lora.record.parameter, **_UNMARKED)
                oriented[name] = lora._replace(a=lora.b.mT, b=lora.a.mT, record=record)
    return oriented


def _pair_refusal(lora: _Lora, where: str) -> str | None:
    """Return why the LoRA of one layer, as it is in the file, cannot be converted, or None."""
    a, b = lora.a, lora.b
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return (
            f"A LoRA to be converted must have matrices of one rank; got shapes {list(a.shape)} and {list(b.shape)} at "
            f"{lora.name!r} in {where!r}."
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return f"The LoRA at {lora.name!r} must be finite; it holds nan or inf in {where!r}."
    return None


def _width_refusal(lora: _Lora, k: int) -> str | None:
    """Return why k blocks do not fit the widths of the layer, or None."""
    in_features, out_features = lora.widths
    if in_features % k == 0 and out_features % k == 0:
        return None
    fitting = ", ".join(map(str, divisors(math.gcd(in_features, out_features))))
    return (
        f"`k` must divide in_features={in_features} and out_features={out_features} at {lora.name!r}; got k={k}. "
        f"Values that fit: {fitting}."
    )


def _split(lora_a: Float[Tensor, "*experts rank in"], lora_b: Float[Tensor, "*experts out rank"], k: int) -> Factors:
    """Give every pair of blocks the LoRA's rows and columns of its own block."""
    A = torch.cat([lora_a.mT.unflatten(-2, (k, -1))] * k, -1)
    B = torch.cat([lora_b.unflatten(-2, (k, -1)).mT] * k, -2)
    return Factors(A, B)


def _beside(
    lora_a: Float[Tensor, "*experts rank in"], lora_b: Float[Tensor, "*experts out rank"], k: int, r: int
) -> Factors:
    """Keep the LoRA as the hybrid part, with new blocks whose update is zero."""
    shapes = factor_shapes(k, r, 0, lora_a.shape[-1], lora_b.shape[-2], tuple(lora_a.shape[:-2]))
    A, B = (lora_a.new_empty(shape) for shape in shapes[:2] if shape)
    zero_update_(Factors(A, B))
    return Factors(A, B, lora_a, lora_b)
