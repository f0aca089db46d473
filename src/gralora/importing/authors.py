"""Adapters written by the authors' own repository (github.com/SqueezeBits/GraLoRA, its fork of PEFT).

According to that fork's `tuners/gralora/{config,layer}.py` and `utils/save_and_load.py`, keys, shapes and the order
of the blocks are PEFT's, `r` includes `hybrid_r`, and the scale is `gralora_alpha / r`. So only the config changes.
"""

from pathlib import Path
from typing import Any

from gralora.checks import require_integer
from gralora.files.adapter_config import config_from, is_original, read_config
from gralora.files.adapter_folder import AdapterFolder
from gralora.files.atomic import check_output
from gralora.files.checkpoint import Adapter, open_tensors


def import_original(source: str | Path, output: str | Path | None = None, *, overwrite: bool = False) -> AdapterFolder:
    """Convert an adapter of the authors' repository to PEFT's format; the tensors are copied bit for bit.

    Args:
        source: Folder of the adapter.
        output: Folder to write; None keeps the result in memory.
        overwrite: Replace an adapter at `output`.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: The adapter is of another origin, damaged, or has no blocks.
    """
    folder = Path(source)
    path = None if output is None else check_output(output, overwrite, (folder,))
    written = read_config(folder)
    if refusal := _origin_refusal(written, str(folder)):
        raise ValueError(refusal)
    total, hybrid_r = written.get("r"), written.get("hybrid_r", 0)
    require_integer("r", total)
    require_integer("hybrid_r", hybrid_r, minimum=0)
    if hybrid_r >= total:
        raise ValueError(f"`r` must be above `hybrid_r`, which it includes; got r={total} with hybrid_r={hybrid_r}.")
    # That repository never saves biases, whatever the config says.
    changed = {"r": total - hybrid_r, "alpha": written["gralora_alpha"], "bias": "none"}
    config = config_from(written | changed, folder)
    adapter = Adapter(str(folder), config, open_tensors(folder))
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors |= dict(zip(layer.keys, adapter.factors(name), strict=False))
    tensors |= {key: adapter.tensors.read(key) for key in adapter.extras}
    imported = AdapterFolder(config.to_dict(), tensors)
    if path is not None:
        imported.save(path, overwrite)
    return imported


def _origin_refusal(written: dict[str, Any], where: str) -> str | None:
    """Return why a config is not one of the authors' repository, or None."""
    peft_type = written.get("peft_type")
    if peft_type == "LORA":
        return f"{where!r} is a LoRA adapter. Convert it with `from_lora`."
    if peft_type != "GRALORA":
        return f"{where!r} must hold a LoRA or a GraLoRA adapter; its config says peft_type={peft_type!r}."
    if not is_original(written):
        return f"{where!r} is a GraLoRA adapter in PEFT's format already; there is nothing to convert."
    return None
