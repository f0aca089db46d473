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
from gralora.files.names import GRALORA_FACTORS, PICKLE_FILE, TENSOR_FILE, group_keys, weight_name
from gralora.files.tensors import TensorDict, TensorFile, Tensors
from gralora.tuner.blocks import Factors, factor_shapes
from gralora.tuner.config import GraloraConfig, LayerSettings


@dataclass(frozen=True)
class AdaptedLayer:
    """Settings, shapes and keys of one adapted layer, without its values.

    Attributes:
        name: Name of the layer in the keys of the file.
        settings: Ranks, number of blocks and scale.
        in_features: Width of the input.
        out_features: Width of the output.
        experts: Number of matrices in a stack; None for a single one.
        record: What the config says of a layer that is not linear; see `GraloraConfig.layer_kinds`.
        parameters: Number of trained values.
        dtype: Data type of the stored factors.
        keys: Keys of the factors in the file, in the order of `Factors`.
    """

    name: str
    settings: LayerSettings
    in_features: int
    out_features: int
    experts: int | None
    record: dict[str, Any]
    parameters: int
    dtype: torch.dtype
    keys: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Kind of the layer: "linear", "conv", "embedding", "parameter" or "attention"."""
        return self.record.get("kind", "linear")

    @property
    def weight(self) -> str:
        """Name of the adapted weight: that of the module, and of the parameter if it is one."""
        return weight_name(self.name, self.record.get("parameter"))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the weight: `[out, in]`, with the experts before it in a stack."""
        matrix = self.out_features, self.in_features
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.settings.scale

    @property
    def rank(self) -> int:
        """Rank of the equivalent LoRA, `k·r + hybrid_r`."""
        return self.settings.gralora_k * self.settings.r + self.settings.hybrid_r


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
        self.layers = {name: self._checked_layer(name, keys) for name, keys in by_module.items()}

    @property
    def largest(self) -> int:
        """Number of elements of the largest adapted weight."""
        return max(layer.in_features * layer.out_features for layer in self.layers.values())

    def factors(self, name: str) -> Factors:
        """Read the factors of one layer, in their stored dtype.

        Raises:
            ValueError: A value is not finite.
        """
        tensors = []
        for key in self.layers[name].keys:
            tensor = self.tensors.read(key)
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{key!r} must be finite; it holds nan or inf in {self.where!r}. The file is damaged, or the "
                    "training diverged."
                )
            tensors.append(tensor)
        return Factors(*tensors)

    def matrices(self, name: str) -> Iterator[Factors]:
        """Read the factors of each matrix of one layer: of every expert of a stack, or of the only one there is.

        Raises:
            ValueError: A value is not finite.
        """
        layer, factors = self.layers[name], self.factors(name)
        if layer.experts is not None:
            yield from (factors.expert(index) for index in range(layer.experts))
        elif factors.in_features > layer.in_features:  # what is beyond the vocabulary was never used
            A, B, *general = (factor.clone() for factor in factors if factor is not None)
            A.view(-1, A.shape[-1])[layer.in_features :] = 0
            if general:
                general[0][:, layer.in_features :] = 0
            yield Factors(A, B, *general)
        else:
            yield factors

    def _checked_layer(self, name: str, keys: dict[str, str]) -> AdaptedLayer:
        record = (self.config.layer_kinds or {}).get(name, {})
        settings = self.config.settings_for(weight_name(name, record.get("parameter")), name)
        k, r, hybrid_r = settings.gralora_k, settings.r, settings.hybrid_r
        wanted = GRALORA_FACTORS if hybrid_r else GRALORA_FACTORS[:2]
        if set(keys) != set(wanted):
            raise ValueError(
                f"{self.where!r} must hold {', '.join(wanted)} with hybrid_r={hybrid_r}; got "
                f"{', '.join(sorted(keys))} at {name!r}."
            )
        shapes = {factor: self.tensors.shape(key) for factor, key in keys.items()}
        a, b = shapes["gralora_A"], shapes["gralora_B"]
        experts = a[:1] if len(a) == 4 and record.get("kind") == "parameter" else ()
        in_features = k * a[-2] if len(a) >= 3 else 0
        out_features = k * b[-1] if len(b) >= 3 else 0
        if record.get("kind") in ("embedding", "conv"):
            in_features, out_features = self._recorded_widths(name, record)
        right = dict(
            zip(GRALORA_FACTORS, factor_shapes(k, r, hybrid_r, in_features, out_features, experts), strict=True)
        )
        for factor, shape in shapes.items():
            if shape != right[factor] or 0 in shape:
                raise ValueError(
                    f"`{factor}` must fit the config (gralora_k={k}, r={r}, hybrid_r={hybrid_r}); got shape "
                    f"{list(shape)} at {name!r} in {self.where!r}."
                )
        dtypes = {self.tensors.dtype(key) for key in keys.values()}
        dtype = dtypes.pop()
        if dtypes or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            got = ", ".join(sorted(str(self.tensors.dtype(key)) for key in keys.values()))
            raise ValueError(f"The factors must have one floating-point dtype; got {got} at {name!r}.")
        return AdaptedLayer(
            name,
            settings,
            in_features,
            out_features,
            experts[0] if experts else None,
            record,
            sum(math.prod(shape) for shape in shapes.values()),
            dtype,
            tuple(keys[factor] for factor in wanted),
        )

    def _recorded_widths(self, name: str, record: dict[str, Any]) -> tuple[int, int]:
        """Return the widths of the weight of which `record` has the shape."""
        shape = record.get("shape")
        if not (isinstance(shape, list) and len(shape) >= 2 and all(isinstance(size, int) for size in shape)):
            raise ValueError(f"`layer_kinds` must have the shape of the weight; got {record!r} at {name!r}.")
        if record["kind"] == "embedding":
            return shape[0], shape[1]
        return math.prod(shape[1:]), shape[0]


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
