"""Adapters of other methods and programs, converted to GraLoRA."""

from gralora.importing.authors import import_original
from gralora.importing.lora import from_lora

__all__ = ["from_lora", "import_original"]
