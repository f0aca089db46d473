"""Leaving with an adapter, and arriving with one: LoRA, GGUF, diffusers, the authors' own format."""

from gralora.export.diffusers import to_diffusers
from gralora.export.engines import rank_warning
from gralora.export.gguf import to_gguf
from gralora.export.lora_in import from_lora
from gralora.export.lora_out import LoraExport, LoraOptions, to_lora
from gralora.export.original import import_original

__all__ = [
    "LoraExport",
    "LoraOptions",
    "from_lora",
    "import_original",
    "rank_warning",
    "to_diffusers",
    "to_gguf",
    "to_lora",
]
