"""Which programs serve a LoRA of which rank, and the commands that do it.

The facts are those of `docs/serving.md`, with their sources.
"""

import shlex
from dataclasses import dataclass

# What `--max-lora-rank` of vLLM takes (vllm.config.lora.MaxLoRARanks, 0.14 and later).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Engine:
    """How one program serves an export.

    Attributes:
        name: Of the program.
        command: The command, or None where the program can't.
        reason: Why it can't.
    """

    name: str
    command: str | None
    reason: str = ""


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM that takes `rank`, or None where none does.

    Example:
        >>> vllm_max_lora_rank(68), vllm_max_lora_rank(1024)
        (128, None)
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def rank_warning(k: int, r: int, hybrid_r: int = 0) -> str | None:
    """Return what to say when an adapter is configured whose rank vLLM can't serve as LoRA, or None.

    Example:
        >>> print(rank_warning(k=8, r=128))
        The rank k·r = 1024 can't be served by vLLM as LoRA, which takes at most 512. Later: `gralora export \
--max-rank 512` compresses the adapter, `gralora merge` folds it into the model.
    """
    rank = k * r + hybrid_r
    if vllm_max_lora_rank(rank) is not None:
        return None
    sum_of = "k·r + hybrid_r" if hybrid_r else "k·r"
    return (
        f"The rank {sum_of} = {rank} can't be served by vLLM as LoRA, which takes at most {VLLM_RANKS[-1]}. Later: "
        f"`gralora export --max-rank {VLLM_RANKS[-1]}` compresses the adapter, `gralora merge` folds it into the model."
    )


def engines_for(rank: int, base: str, name: str, output: str) -> list[Engine]:
    """Return how each program serves a LoRA folder of rank `rank`.

    Args:
        rank: Of the export.
        base: Base model, as it is written to the command.
        name: The name that requests give the adapter.
        output: The export.
    """
    base, module = shlex.quote(base), shlex.quote(f"{name}={output}")
    accepted = vllm_max_lora_rank(rank)
    vllm = Engine("vLLM", None, f"rank {rank} is above its highest --max-lora-rank, {VLLM_RANKS[-1]}")
    if accepted is not None:
        vllm = Engine("vLLM", f"vllm serve {base} --enable-lora --lora-modules {module} --max-lora-rank {accepted}")
    sglang = (
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {module} --max-lora-rank {rank}"
    )
    return [vllm, Engine("SGLang", sglang)]


def llama_cpp_command(output: str) -> str:
    """Return the command that serves a GGUF adapter."""
    return f"llama-server -m BASE.gguf --lora {shlex.quote(output)}"


def ways_out(rank: int) -> str | None:
    """Return what to do where an engine can't take `rank`, or None where all can."""
    if vllm_max_lora_rank(rank) is not None:
        return None
    return f"--max-rank {VLLM_RANKS[-1]} compresses the adapter; `gralora merge` folds it into the model."
