"""An adapter in memory that can be written as a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gralora.files.atomic import appearing, check_output
from gralora.files.names import CONFIG_FILE, TENSOR_FILE


@dataclass
class AdapterFolder:
    """An adapter as PEFT's `from_pretrained` reads it.

    Attributes:
        config: Content of `adapter_config.json`.
        tensors: Content of `adapter_model.safetensors`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, output: str | Path, overwrite: bool = False) -> Path:
        """Write the folder; it appears under its name only when it is complete.

        Args:
            output: Folder to write, which must not exist.
            overwrite: Replace an adapter at `output`.

        Raises:
            ValueError: `output` exists and may not be replaced.
        """
        path = check_output(output, overwrite)
        with appearing(path) as folder:
            self.write(folder)
        return path

    def write(self, folder: Path) -> None:
        """Create `folder` and write both files, not atomically."""
        folder.mkdir()
        save_file(self.tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
