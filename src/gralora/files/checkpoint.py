"""A GraLoRA adapter, read lazily from its folder (without the base model) or from a model that carries it.

Opening an adapter reads its config and the header of its tensor file and checks that they fit together. The
tensors are read on demand, one layer at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gralora.files.adapter_config import config_from, read_gralora_config, require_peft_type
from gralora.files.layer_record import LayerRecord
from gralora.files.names import GRALORA_FACTORS, PICKLE_FILE, TENSOR_FILE, group_keys, module_name, natural_order
from gralora.files.tensors import TensorDict, TensorFile, Tensors
from gralora.tuner.blocks import Factors, factor_shapes
from gralora.tuner.config import GraloraConfig, LayerSettings


@dataclass(frozen=True)
class AdaptedLayer:
    """Settings, shapes and keys of one adapted layer, without its values.

    Attributes:
        name: Name of the module in the base model; of an adapted parameter, with the parameter's own name.
        module: Name in the keys. Layers of several parameters of a module lie around each other, and all but the
            outermost have `.base_layer` in it.
        settings: Ranks, number of blocks and scale.
        in_features: Width of the input of one matrix.
        out_features: Width of the output of one matrix.
        experts: Number of matrices where the weight is a stack of them; None for a single matrix.
        record: What the config says of a layer that is not linear.
        dtype: Data type of the stored factors.
        keys: Keys of the factors in the file, in the order of `Factors`.
    """

    name: str
    module: str
    settings: LayerSettings
    in_features: int
    out_features: int
    experts: int | None
    record: LayerRecord
    dtype: torch.dtype
    keys: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.settings.scale

    @property
    def rank(self) -> int:
        """Rank of the equivalent LoRA, `k·r + hybrid_r`."""
        return self.settings.gralora_k * self.settings.r + self.settings.hybrid_r

    @property
    def padded_in_features(self) -> int:
        """Width of the input blocks together, the last of which may reach beyond the input."""
        k = self.settings.gralora_k
        return k * -(-self.in_features // k)

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        rank = self.settings.r + self.settings.hybrid_r
        return (self.experts or 1) * rank * (self.padded_in_features + self.out_features)

    @property
    def weight_name(self) -> str:
        """Name of the weight in the state dict of the base model."""
        return self.name if self.record.parameter else f"{self.name}.weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, but that each matrix of it may be stored transposed."""
        if self.record.shape is not None:
            return self.record.shape
        return (*((self.experts,) if self.experts else ()), self.out_features, self.in_features)


class Adapter:
    """A GraLoRA adapter whose config and tensors fit together.

    Attributes:
        where: Folder or model of the adapter, for messages.
        config: Its config.
        tensors: All its tensors by key, unread.
        layers: Adapted layers by module name, in natural order.
        extras: Keys of everything else that was trained: biases, whole modules, rows of embeddings.

    Raises:
        ValueError: Config and tensors do not fit together.
    """

    def __init__(self, where: str, config: GraloraConfig, tensors: Tensors) -> None:
        self.where = where
        self.config = config
        self.tensors = tensors
        by_module, self.extras = group_keys(tensors.keys(), GRALORA_FACTORS)
        if not by_module:
            raise ValueError(f"{where!r} must hold a GraLoRA adapter; it has no `gralora_A` and no `gralora_B`.")
        records = _records(config, where)
        if missing := sorted(records.keys() - by_module.keys(), key=natural_order):
            raise ValueError(f"{where!r} must hold tensors for all of `layer_kinds`; it has none for {missing[0]!r}.")
        layers = (self._checked_layer(name, keys, records.get(name)) for name, keys in by_module.items())
        self.layers = {layer.name: layer for layer in layers}

    @property
    def largest(self) -> int:
        """Number of elements of the largest adapted matrix."""
        return max(layer.in_features * layer.out_features for layer in self.layers.values())

    def factors(self, name: str) -> Factors:
        """Read the factors of one layer, in their stored dtype; those of a stack are stacks.

        What a last input block has beyond the input belongs to no feature, and is set to zero.

        Raises:
            ValueError: A value is not finite.
        """
        layer, tensors = self.layers[name], []
        for key in layer.keys:
            tensor = self.tensors.read(key)
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{key!r} must be finite; it holds nan or inf in {self.where!r}. The file is damaged, or the "
                    "training diverged."
                )
            tensors.append(tensor)
        factors = Factors(*tensors)
        if layer.padded_in_features == layer.in_features:
            return factors
        A, B, A_general, B_general = factors
        is_feature = torch.arange(layer.padded_in_features) < layer.in_features
        A = A * is_feature.view(*A.shape[-3:-1], 1)
        return Factors(A, B, None if A_general is None else A_general * is_feature, B_general)

    def matrices(self, name: str) -> Iterator[Factors]:
        """Read the factors of each matrix of one layer: one for every expert of a stack, else a single one.

        Raises:
            ValueError: A value is not finite.
        """
        factors, experts = self.factors(name), self.layers[name].experts
        yield from [factors] if experts is None else (factors.expert(index) for index in range(experts))

    def _checked_layer(self, module: str, keys: dict[str, str], record: LayerRecord | None) -> AdaptedLayer:
        if record is None and module.endswith(".base_layer"):
            raise ValueError(f"{module!r} must be described in `layer_kinds`; the config of {self.where!r} lacks it.")
        record = record or LayerRecord()
        holder = module
        while record.parameter and holder.endswith(".base_layer"):
            holder = holder.removesuffix(".base_layer")
        name = f"{holder}.{record.parameter}" if record.parameter else module
        settings = self.config.settings_for(name, holder if record.parameter else None)
        k, r, hybrid_r = settings.gralora_k, settings.r, settings.hybrid_r
        wanted = GRALORA_FACTORS if hybrid_r else GRALORA_FACTORS[:2]
        if set(keys) != set(wanted):
            raise ValueError(
                f"{self.where!r} must hold {', '.join(wanted)} with hybrid_r={hybrid_r}; got "
                f"{', '.join(sorted(keys))} at {name!r}."
            )
        shapes = {factor: self.tensors.shape(key) for factor, key in keys.items()}
        a, b = shapes["gralora_A"], shapes["gralora_B"]
        if len(a) == 4 and record.kind != "parameter":
            raise ValueError(
                "`gralora_A` must have three dimensions, or `layer_kinds` must say that it is a stack; got shape "
                f"{list(a)} at {name!r} in {self.where!r}."
            )
        experts = a[:-3]
        in_features, out_features = _widths(record, k, a, b) if len(a) in (3, 4) and len(b) == len(a) else (0, 0)
        right = factor_shapes(k, r, hybrid_r, in_features, out_features, experts)
        for factor, shape in zip(GRALORA_FACTORS, right, strict=True):
            if factor in shapes and (shapes[factor] != shape or 0 in shapes[factor]):
                of_weight = f", weight {list(record.shape)}" if record.shape else ""
                raise ValueError(
                    f"`{factor}` must fit the config (gralora_k={k}, r={r}, hybrid_r={hybrid_r}{of_weight}); got shape "
                    f"{list(shapes[factor])} at {name!r} in {self.where!r}."
                )
        dtypes = {self.tensors.dtype(key) for key in keys.values()}
        dtype = dtypes.pop()
        if dtypes or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            got = ", ".join(sorted(str(self.tensors.dtype(key)) for key in keys.values()))
            raise ValueError(f"The factors must have one floating-point dtype; got {got} at {name!r}.")
        return AdaptedLayer(
            name,
            module,
            settings,
            in_features,
            out_features,
            experts[0] if experts else None,
            record,
            dtype,
            tuple(keys[factor] for factor in wanted),
        )


def _records(config: GraloraConfig, where: str) -> dict[str, LayerRecord]:
    """Return what the config says of layers that are not linear, by the names in the keys."""
    written: Any = config.layer_kinds or {}
    if not isinstance(written, dict):
        raise ValueError(f"`layer_kinds` must map names of layers to records; got {written!r} in {where!r}.")
    return {module_name(name): LayerRecord.of(record, name, where) for name, record in written.items()}


def _widths(record: LayerRecord, k: int, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    """Return the widths of one matrix: those of the recorded weight, else of the factors."""
    if record.kind == "embedding" and record.shape:
        return record.shape[0], record.shape[1]
    if record.kind == "conv" and record.shape:
        return math.prod(record.shape[1:]), record.shape[0]
    return k * a[-2], k * b[-1]


def open_adapter(source: str | Path | nn.Module, adapter_name: str = "default") -> Adapter:
    """Open a GraLoRA adapter.

    Args:
        source: Folder of an adapter, or a model that carries one.
        adapter_name: Name of the adapter on a model.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The source is not a complete GraLoRA adapter in PEFT's format.
    """
    if isinstance(source, nn.Module):
        config, tensors, where = read_model(source, adapter_name)
        require_peft_type(config.to_dict(), "GRALORA", where)
        return Adapter(where, GraloraConfig.copy_of(config), tensors)
    config = config_from(read_gralora_config(source), source)
    return Adapter(str(source), config, open_tensors(source))


def open_tensors(folder: str | Path) -> TensorFile:
    """Open the tensor file of an adapter's folder.

    Raises:
        FileNotFoundError: The folder has no such file, or only a pickled one.
        ValueError: The file is damaged.
    """
    folder = Path(folder)
    if (folder / TENSOR_FILE).is_file():
        return TensorFile(folder / TENSOR_FILE)
    pickled = ""
    if (folder / PICKLE_FILE).is_file():
        pickled = f" {PICKLE_FILE} is not read: load it with PEFT and save it with `safe_serialization=True`."
    raise FileNotFoundError(
        f"`adapter` must be the folder of an adapter; {str(folder)!r} has no {TENSOR_FILE}.{pickled}"
    )


def read_model(model: nn.Module, adapter_name: str) -> tuple[Any, TensorDict, str]:
    """Return PEFT's config of an adapter on `model`, its tensors under the keys of a checkpoint, and its description.

    Raises:
        ValueError: The model has no adapter of that name.
    """
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"`adapter_name` must be one of {sorted(configs)}; got adapter_name={adapter_name!r}.")
    # Finding out whether embeddings were resized would ask the hub for the base model.
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return configs[adapter_name], TensorDict(tensors), f"adapter {adapter_name} of {type(model).__name__}"


def folders_read(source: str | Path | nn.Module) -> tuple[Path, ...]:
    """Return the folders that opening `source` reads, which writing must not replace; none for a model."""
    return () if isinstance(source, nn.Module) else (Path(source),)
