"""GraLoRA, Granular Low-Rank Adaptation (NeurIPS 2025), for Hugging Face PEFT.

Importing this package is enough: from then on PEFT uses it for `PeftType.GRALORA`, and
`peft.GraloraConfig` is the one below.
"""

from peft import PeftModel, get_peft_model

from gralora.export import to_lora
from gralora.importing import from_lora
from gralora.tuner.config import GraloraConfig
from gralora.tuner.kinds import register_kind, unregister_kind
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.model import GraloraModel, rescale_adapter_scale
from gralora.tuner.registration import register, unregister

__version__ = "0.1.0"
__all__ = [
    "GraloraConfig",
    "GraloraLayer",
    "GraloraModel",
    "PeftModel",
    "from_lora",
    "get_peft_model",
    "register",
    "register_kind",
    "rescale_adapter_scale",
    "to_lora",
    "unregister",
    "unregister_kind",
]

register()
