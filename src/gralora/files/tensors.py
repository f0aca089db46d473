"""Tensors by key, from a file that is read lazily or from memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors(Protocol):
    """Tensors by key; shapes and dtypes are known before the values are read."""

    def keys(self) -> Iterable[str]:
        """Return the keys."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        ...

    def dtype(self, key: str) -> torch.dtype | str:
        """Return the dtype of one tensor, or its name in the file if it is not one that gralora computes with."""
        ...

    def read(self, key: str) -> Tensor:
        """Return one tensor, on the CPU and without gradient."""
        ...


class TensorFile:
    """A safetensors file. Opening it reads only the header.

    Raises:
        ValueError: The file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
            self._keys = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} must be a whole safetensors file; it cannot be read: {error}") from None

    def keys(self) -> list[str]:
        """Return the keys."""
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype | str:
        """Return the dtype of one tensor, or its name in the file if it is not one that gralora computes with."""
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
