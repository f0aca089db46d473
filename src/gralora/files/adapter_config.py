"""Reading the `adapter_config.json` of an adapter, and the rule for its `peft_type`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from gralora.files.names import CONFIG_FILE
from gralora.tuner.config import GraloraConfig

_METHODS = {"GRALORA": "GraLoRA", "LORA": "LoRA"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return what the `adapter_config.json` of an adapter of any type holds.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: The file is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"`adapter` must be the folder of an adapter; {str(folder)!r} has no {CONFIG_FILE}.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON; it cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(config).__name__}.")
    return config


def read_gralora_config(folder: str | Path) -> dict[str, Any]:
    """Return the config of a GraLoRA adapter in PEFT's format.

    Raises:
        FileNotFoundError: The folder has no `adapter_config.json`.
        ValueError: The file is damaged, of another method, or in the format of the authors' repository.
    """
    config = read_config(folder)
    require_peft_type(config, "GRALORA", str(folder))
    if is_original(config):
        raise ValueError(
            f"{str(folder)!r} was written by the authors' repository. Convert it to PEFT's format first: "
            f"gralora import {folder} OUT"
        )
    return config


def require_peft_type(config: dict[str, Any], peft_type: str, where: str) -> None:
    """Check that `config` is one of an adapter of `peft_type`, "GRALORA" or "LORA".

    Args:
        config: Fields of an adapter's config.
        peft_type: Required type.
        where: Folder or model of the adapter, for the message.

    Raises:
        ValueError: The type is another one.
    """
    # In memory PEFT keeps an enum, whose value is the string of the file.
    found = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if found != peft_type:
        raise ValueError(f"{where!r} must hold a {_METHODS[peft_type]} adapter; its config says peft_type={found!r}.")


def is_original(config: dict[str, Any]) -> bool:
    """Return whether `config` is in the format of the authors' repository, which alone has `gralora_alpha`."""
    return "gralora_alpha" in config


def config_from(written: dict[str, Any], where: str | Path) -> GraloraConfig:
    """Return `written` as a config, without the fields that only newer versions know.

    Args:
        written: Fields of the config.
        where: Folder or model that they come from, for the message.

    Raises:
        ValueError: A value breaks its rule.
    """
    known = {field.name for field in fields(GraloraConfig)}
    try:
        return GraloraConfig(**{name: value for name, value in written.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The config of {str(where)!r} cannot be used: {error}") from None
