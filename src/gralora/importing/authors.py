"""Adapters written by the authors' own repository (github.com/SqueezeBits/GraLoRA, its fork of PEFT).

According to that fork's `tuners/gralora/{config,layer}.py` and `utils/save_and_load.py`, keys, shapes and the order
of the blocks are PEFT's, `r` includes `hybrid_r`, and the scale is `gralora_alpha / r`. So only the config changes.
"""

from pathlib import Path

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
    if written.get("peft_type") != "GRALORA" or not is_original(written):
        raise ValueError(
            f"{str(folder)!r} must be an adapter of the authors' repository, with `gralora_alpha` in its config; got "
            f"peft_type={written.get('peft_type')!r} without it."
        )
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
