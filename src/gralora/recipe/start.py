"""The adapter that a run starts from."""

from pathlib import Path
from typing import Any

from gralora.files.adapter_config import read_config, read_gralora_config
from gralora.files.names import CONFIG_FILE


def read_start(folder: str) -> dict[str, Any]:
    """Return the config of the adapter in `folder`, which `start_from` names; PEFT reads one of any method.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It is of another method, or its configuration is damaged.
    """
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"`start_from` must be the folder of an adapter; {folder!r} has no {CONFIG_FILE}.")
    if read_config(folder).get("peft_type") == "LORA":
        raise ValueError(
            f"`start_from` must be a GraLoRA adapter; {folder!r} is a LoRA. Convert it first: "
            f"gralora import {folder} OUTPUT"
        )
    return read_gralora_config(folder)
