"""Adapters written for other programs: LoRA, GGUF, diffusers, or merged into the base model."""

from gralora.export.convert import LoraExport, LoraOptions
from gralora.export.diffusers import to_diffusers
from gralora.export.engines import rank_warning
from gralora.export.gguf import to_gguf
from gralora.export.lora import to_lora

__all__ = ["LoraExport", "LoraOptions", "rank_warning", "to_diffusers", "to_gguf", "to_lora"]
