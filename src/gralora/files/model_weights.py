"""Weights of a base model, read one at a time from its folder."""

import json
import math
from pathlib import Path

from gralora.files.tensors import TensorFile

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# diffusers' name for the weights of one component.
_COMPONENT_FILE = "diffusion_pytorch_model.safetensors"


class BaseWeights:
    """The weights in the safetensors files of a model's folder.

    Args:
        folder: Folder of the model.

    Raises:
        FileNotFoundError: The folder has no safetensors file.
        ValueError: A file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        names = [name for name in (_FILE, _COMPONENT_FILE) if (folder / name).is_file()]
        if not names and (folder / _INDEX).is_file():
            try:
                names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{str(folder / _INDEX)!r} must be the index of a model; it cannot be read: {error}"
                ) from None
        if not names:
            raise FileNotFoundError(f"`base` must be the folder of a model; {str(folder)!r} has no {_FILE}.")
        self._files: dict[str, TensorFile] = {}
        for file in (TensorFile(folder / name) for name in names):
            self._files |= dict.fromkeys(file.keys(), file)

    def norm(self, name: str, shape: tuple[int, ...]) -> float | None:
        """Return the Frobenius norm of a weight, or None if there is none of that shape.

        A weight may also be stored transposed or with a kernel, and files often omit the first part of a name.

        Args:
            name: Name of the module, or of a parameter.
            shape: `[out, in]`, or `[experts, out, in]`.
        """
        parts = name.split(".")
        for start in range(len(parts)):
            for key in (".".join([*parts[start:], "weight"]), ".".join(parts[start:])):
                if key in self._files:
                    file = self._files[key]
                    found = file.shape(key)
                    flat = (found[0], math.prod(found[1:])) if found else ()
                    if shape in (found, flat) or (*shape[:-2], shape[-1], shape[-2]) == found:
                        return float(file.read(key).double().norm())
                    return None
        return None
