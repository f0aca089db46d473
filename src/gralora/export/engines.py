"""Which programs serve a LoRA of which rank, and with which command.

The facts and their sources are in `docs/serving.md`.
"""

import shlex
from dataclasses import dataclass

from gralora.export.layouts import Experts

# Values of vLLM's `--max-lora-rank` (vllm.config.lora.MaxLoRARanks, 0.14 and later).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Engine:
    """How one program serves an export.

    Attributes:
        name: Name of the program.
        command: Command that serves the export; None if the program cannot.
        reason: Why it cannot.
        note: What has to be declared beside the command.
    """

    name: str
    command: str | None
    reason: str = ""
    note: str = ""


_STACKED = (
    "experts are stacked: without further settings this is right for model classes of vLLM with `is_3d_moe_weight`. "
    "For others set `enable_mixed_moe_lora_format`, and `is_3d_lora_weight` in the request that loads the adapter; a "
    "wrong declaration loads wrong values without an error. Or export with --experts per-expert."
)
_PER_EXPERT = "experts are linear layers: right for model classes of vLLM without `is_3d_moe_weight`."


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM that takes `rank`, or None if none does.

    Example:
        >>> vllm_max_lora_rank(68), vllm_max_lora_rank(1024)
        (128, None)
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def rank_warning(k: int, r: int, hybrid_r: int = 0) -> str | None:
    """Return a warning for settings whose LoRA rank vLLM cannot serve, or None if it can.

    Example:
        >>> print(rank_warning(k=8, r=128))
        The rank k·r = 1024 cannot be served by vLLM as LoRA, which takes at most 512. Later: `gralora export \
--max-rank 512` compresses the adapter, `gralora merge` merges it into the model.
    """
    rank = k * r + hybrid_r
    if vllm_max_lora_rank(rank) is not None:
        return None
    sum_of = "k·r + hybrid_r" if hybrid_r else "k·r"
    return (
        f"The rank {sum_of} = {rank} cannot be served by vLLM as LoRA, which takes at most {VLLM_RANKS[-1]}. Later: "
        f"`gralora export --max-rank {VLLM_RANKS[-1]}` compresses the adapter, `gralora merge` merges it into the "
        "model."
    )


def lora_engines(rank: int, base: str, name: str, output: str, experts: Experts | None = None) -> list[Engine]:
    """Return how each program serves a LoRA folder.

    Args:
        rank: Rank of the export.
        base: Base model, as written in the command.
        name: Name by which requests address the adapter.
        output: Folder of the export.
        experts: How stacks of experts were written; None where there are none.
    """
    base, module = shlex.quote(base), shlex.quote(f"{name}={output}")
    accepted = vllm_max_lora_rank(rank)
    vllm = Engine("vLLM", None, f"rank {rank} is above its highest --max-lora-rank, {VLLM_RANKS[-1]}")
    if accepted is not None:
        note = {None: "", "stacked": _STACKED, "per-expert": _PER_EXPERT}[experts]
        command = f"vllm serve {base} --enable-lora --lora-modules {module} --max-lora-rank {accepted}"
        vllm = Engine("vLLM", command, note=note)
    if experts is not None:  # how other programs read adapters of experts is not known
        return [vllm]
    sglang = (
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {module} --max-lora-rank {rank}"
    )
    llama_cpp = f"gralora export --format gguf, then {_llama_cpp_command('OUT.gguf')}"
    return [vllm, Engine("SGLang", sglang), Engine("llama.cpp", llama_cpp)]


def gguf_engines(rank: int, base: str, name: str, output: str, experts: Experts | None = None) -> list[Engine]:
    """Return how each program serves a GGUF file; the arguments are those of `lora_engines`."""
    return [Engine("llama.cpp", _llama_cpp_command(output))]


def _llama_cpp_command(output: str) -> str:
    return f"llama-server -m BASE.gguf --lora {shlex.quote(output)}"
