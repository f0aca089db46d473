"""An adapter in memory, and its two files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import CONFIG_NAME


@dataclass
class AdapterFolder:
    """An adapter as PEFT's `from_pretrained` reads it.

    Attributes:
        config: What `adapter_config.json` holds.
        tensors: What `adapter_model.safetensors` holds.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, output: str | Path, overwrite: bool = False) -> Path:
        """Write the folder; it appears when it is whole.

        Args:
            output: A folder that does not exist.
            overwrite: Replace an adapter that is there.

        Raises:
            ValueError: It exists, or is no adapter that could be replaced.
        """
        path = check_output(output, overwrite)
        with appearing(path) as folder:
            self.write(folder)
        return path

    def write(self, folder: Path) -> None:
        """Write the two files into a new `folder`."""
        folder.mkdir()
        save_file(self.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n")
