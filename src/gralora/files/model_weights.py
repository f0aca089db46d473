"""Weights of a base model, read one at a time from its folder."""

import json
import math
import re
from pathlib import Path

from gralora.files.tensors import TensorFile

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# diffusers' name for the weights of one component.
_COMPONENT_FILE = "diffusion_pytorch_model.safetensors"
# Names of the weights of one expert in files, by the parameter that is the stack of them in transformers 5.
_NAMES_BY_EXPERT = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj", "w2"),
}


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

    def norm(self, weight: str, shape: tuple[int, ...]) -> float | None:
        """Return the Frobenius norm of a weight, or None if there is none of that name and shape.

        Its matrices may also be stored transposed, files often omit the first part of a name, and the experts of a
        stack may each have weights of their own there.

        Args:
            weight: Name of the weight in the model.
            shape: Shape of the weight.
        """
        parts = weight.split(".")
        for start in range(len(parts)):
            key = ".".join(parts[start:])
            if key in self._files:
                file = self._files[key]
                if file.shape(key) in (shape, (*shape[:-2], shape[-1], shape[-2])):
                    return float(file.read(key).double().norm())
                return None
            if (keys := self._keys_by_expert(key)) and sum(map(self._size, keys)) == math.prod(shape):
                return math.hypot(*(float(self._files[key].read(key).double().norm()) for key in keys))
        return None

    def _keys_by_expert(self, stack: str) -> list[str]:
        """Return the keys of the weights of which a stack of experts consists."""
        path, _, parameter = stack.rpartition(".experts.")
        names = _NAMES_BY_EXPERT.get(parameter)
        if not path or names is None:
            return []
        pattern = re.compile(rf"{re.escape(path.rpartition('.')[0])}\.\w+\.experts\.\d+\.({'|'.join(names)})\.weight")
        return [key for key in self._files if pattern.fullmatch(key)]

    def _size(self, key: str) -> int:
        return math.prod(self._files[key].shape(key))
