"""An adapter, read lazily: from its folder without the base model, or from a model that carries it.

Opening reads the config and the header of the tensor file and checks that they fit together; a layer's
tensors are read when they are asked for, one layer at a time.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gralora.tuner.blocks import Factors
from gralora.tuner.config import GraloraConfig, LayerSettings

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_FACTORS = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors(Protocol):
    """Tensors by key, whose shapes are known before they are read."""

    def keys(self) -> Iterable[str]:
        """Return the keys."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one."""
        ...

    def dtype(self, key: str) -> torch.dtype | str:
        """Return the dtype of one, or its name in the file where it is none that is computed with."""
        ...

    def read(self, key: str) -> Tensor:
        """Return one."""
        ...


class TensorFile:
    """A safetensors file; only its header is read at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            self._keys = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} must be a whole safetensors file; it can't be read: {error}") from None

    def keys(self) -> list[str]:
        """Return the keys."""
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype | str:
        """Return the dtype of one tensor."""
        name = self._file.get_slice(key).get_dtype()
        return _DTYPES.get(name, name)

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._file.get_tensor(key)


class TensorDict:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        """Return the keys."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        """Return one tensor, on the CPU and without gradient."""
        return self._tensors[key].detach().cpu()


@dataclass(frozen=True)
class AdaptedLayer:
    """What the header says about one adapted layer.

    Attributes:
        name: Of the module in the base model.
        settings: Ranks, blocks and scale.
        in_features: Width of the input.
        out_features: Width of the output.
        dtype: Of the stored factors.
        keys: Of the factors in the file, in the order of `Factors`.
    """

    name: str
    settings: LayerSettings
    in_features: int
    out_features: int
    dtype: torch.dtype
    keys: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Rank of the LoRA that is the same map: `k·r + hybrid_r`."""
        return self.settings.gralora_k * self.settings.r + self.settings.hybrid_r

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return (self.settings.r + self.settings.hybrid_r) * (self.in_features + self.out_features)


class Adapter:
    """A GraLoRA adapter whose config and tensors fit together.

    Attributes:
        where: Folder or model, for messages.
        config: Its config.
        layers: The adapted layers by module name, in the order of depth.
        extras: Keys of what else was trained: biases, whole modules, rows of embeddings.
    """

    def __init__(self, where: str, config: GraloraConfig, tensors: Tensors) -> None:
        self.where = where
        self.config = config
        self.tensors = tensors
        by_module, self.extras = _group(tensors.keys())
        if not by_module:
            raise ValueError(f"{where!r} must hold a GraLoRA adapter; it has no `gralora_A` and no `gralora_B`.")
        self.layers = {name: self._check_layer(name, by_module[name]) for name in sorted(by_module, key=natural_order)}

    @property
    def largest(self) -> int:
        """Elements of the largest weight that is adapted."""
        return max(layer.in_features * layer.out_features for layer in self.layers.values())

    def factors(self, name: str) -> Factors:
        """Return the factors of one layer, as they are stored.

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

    def _check_layer(self, name: str, keys: dict[str, str]) -> AdaptedLayer:
        settings = self.config.settings_for(name)
        k, r, q = settings.gralora_k, settings.r, settings.hybrid_r
        wanted = _FACTORS if q else _FACTORS[:2]
        if set(keys) != set(wanted):
            raise ValueError(
                f"{self.where!r} must hold {', '.join(wanted)} with hybrid_r={q}; got {', '.join(sorted(keys))} at "
                f"{name!r}."
            )
        shapes = {factor: self.tensors.shape(key) for factor, key in keys.items()}
        a, b = shapes["gralora_A"], shapes["gralora_B"]
        in_features = k * a[1] if len(a) == 3 else 0
        out_features = k * b[2] if len(b) == 3 else 0
        right = {
            "gralora_A": (k, in_features // k, r),
            "gralora_B": (k, r, out_features // k),
            "gralora_A_general.weight": (q, in_features),
            "gralora_B_general.weight": (out_features, q),
        }
        for factor, shape in shapes.items():
            if shape != right[factor] or 0 in shape:
                raise ValueError(
                    f"`{factor}` must fit the config (gralora_k={k}, r={r}, hybrid_r={q}); got shape {list(shape)} at "
                    f"{name!r} in {self.where!r}."
                )
        dtypes = {self.tensors.dtype(key) for key in keys.values()}
        dtype = dtypes.pop()
        if dtypes or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            got = ", ".join(sorted(str(self.tensors.dtype(key)) for key in keys.values()))
            raise ValueError(f"The factors must be of one floating-point dtype; got {got} at {name!r}.")
        return AdaptedLayer(name, settings, in_features, out_features, dtype, tuple(keys[factor] for factor in wanted))


def open_adapter(source: str | Path | nn.Module, adapter_name: str = "default") -> Adapter:
    """Open a GraLoRA adapter.

    Args:
        source: Folder of an adapter, or a model that carries one.
        adapter_name: Which one of the model's.

    Raises:
        FileNotFoundError: No such folder, or a file of it is missing.
        ValueError: Something else than a whole GraLoRA adapter.
    """
    if isinstance(source, nn.Module):
        config, tensors = read_model(source, adapter_name)
        if config.peft_type != "GRALORA":
            raise ValueError(f"`adapter_name` must be a GraLoRA adapter; {adapter_name!r} is {config.peft_type}.")
        return Adapter(type(source).__name__, GraloraConfig.copy_of(config), tensors)
    folder = Path(source)
    written = read_config(folder)
    if written.get("peft_type") != "GRALORA":
        raise ValueError(
            f"{str(folder)!r} must hold a GraLoRA adapter; its config says peft_type={written.get('peft_type')!r}."
        )
    if "gralora_alpha" in written:
        raise ValueError(
            f"{str(folder)!r} was written by the authors' repository. Turn it into PEFT's format first: "
            f"gralora import {folder} OUT"
        )
    return Adapter(str(folder), config_from(written, folder), TensorFile(tensor_path(folder)))


def read_config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json` of `folder`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"`adapter` must be the folder of an adapter; {str(folder)!r} has no {CONFIG_NAME}.")
    try:
        written = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON; it can't be read: {error}") from None
    if not isinstance(written, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(written).__name__}.")
    return written


def config_from(written: dict[str, Any], folder: Path) -> GraloraConfig:
    """Return the config that `written` holds, fields of newer versions left out.

    Raises:
        ValueError: A value breaks its rule.
    """
    known = {field.name for field in fields(GraloraConfig)}
    try:
        return GraloraConfig(**{name: value for name, value in written.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / CONFIG_NAME)!r}: {error}") from None


def tensor_path(folder: Path) -> Path:
    """Return the path of the tensor file in `folder`.

    Raises:
        FileNotFoundError: There is none, or only a pickled one.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        return path
    pickled = ""
    if (folder / WEIGHTS_NAME).is_file():
        pickled = f" {WEIGHTS_NAME} is not read: load it with PEFT and save it with safe_serialization=True."
    raise FileNotFoundError(f"`adapter` must have a {SAFETENSORS_WEIGHTS_NAME}; {str(folder)!r} has none.{pickled}")


def read_model(model: nn.Module, adapter_name: str) -> tuple[Any, TensorDict]:
    """Return config and tensors of an adapter on `model`, the tensors under the keys of a checkpoint.

    Raises:
        ValueError: There is no adapter of that name.
    """
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"`adapter_name` must be one of {sorted(configs)}; got adapter_name={adapter_name!r}.")
    # Looking up whether embeddings were resized would ask the hub for the base model.
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return configs[adapter_name], TensorDict(tensors)


def module_name(key: str) -> str:
    """Return the key without what PEFT and torch.compile put before the module's name."""
    return key.removeprefix(PREFIX).replace("_orig_mod.", "")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _group(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    by_module: dict[str, dict[str, str]] = {}
    extras = []
    for key in keys:
        factor = next((factor for factor in _FACTORS if key.endswith(f".{factor}")), None)
        if factor is None:
            extras.append(key)
        else:
            by_module.setdefault(module_name(key.removesuffix(f".{factor}")), {})[factor] = key
    return by_module, tuple(sorted(extras, key=natural_order))
