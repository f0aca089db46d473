"""GraLoRA, Granular Low-Rank Adaptation (NeurIPS 2025), for Hugging Face PEFT.

Importing this package is enough: from then on PEFT uses it for `PeftType.GRALORA`, and
`peft.GraloraConfig` is the one below. PEFT and torch are imported when they are first needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gralora.deferred import register_with_peft

if TYPE_CHECKING:
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

_MODULES = {
    "GraloraConfig": "gralora.tuner.config",
    "GraloraLayer": "gralora.tuner.layer",
    "GraloraModel": "gralora.tuner.model",
    "PeftModel": "peft",
    "from_lora": "gralora.importing",
    "get_peft_model": "peft",
    "register": "gralora.tuner.registration",
    "register_kind": "gralora.tuner.kinds",
    "rescale_adapter_scale": "gralora.tuner.model",
    "to_lora": "gralora.export",
    "unregister": "gralora.tuner.registration",
    "unregister_kind": "gralora.tuner.kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gralora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
