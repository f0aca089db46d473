"""Which programs serve a LoRA of which rank, and with which command.

The facts and their sources are in `docs/serving.md`.
"""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass

from gralora.export.layouts import TRANSPOSED_EXPERTS, ExpertsLayout

# Values of vLLM's `--max-lora-rank` (vllm.config.lora.MaxLoRARanks, 0.14 and later).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What a GGUF adapter can adapt, as `layouts.kind_of` says it.
GGUF_HOLDS = ("linear layers", "embeddings", "experts", "parameters")


@dataclass(frozen=True)
class Engine:
    """How one program serves an export.

    Attributes:
        name: Name of the program.
        command: Command that serves the export; None if the program cannot.
        reason: Why it cannot.
        note: What must be known of the command.
    """

    name: str
    command: str | None
    reason: str = ""
    note: str = ""


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


def lora_engines(
    rank: int, base: str, name: str, output: str, kinds: Collection[str] = (), experts: ExpertsLayout = "stacked"
) -> list[Engine]:
    """Return how each program serves a LoRA folder.

    Args:
        rank: Rank of the export.
        base: Base model, as written in the command.
        name: Name by which requests address the adapter.
        output: Folder of the export.
        kinds: What it adapts, as `layouts.kind_of` says it.
        experts: How the experts of a mixture are written, if it adapts some.
    """
    return [
        _vllm(rank, base, name, output, kinds, experts),
        _sglang(rank, base, name, output, kinds, experts),
        _llama_cpp(kinds),
    ]


def gguf_engines(
    rank: int, base: str, name: str, output: str, kinds: Collection[str] = (), experts: ExpertsLayout = "stacked"
) -> list[Engine]:
    """Return how each program serves a GGUF file; the arguments are those of `lora_engines`."""
    return [Engine("llama.cpp", _llama_cpp_command(output))]


def _vllm(rank: int, base: str, name: str, output: str, kinds: Collection[str], experts: ExpertsLayout) -> Engine:
    accepted = vllm_max_lora_rank(rank)
    if accepted is None:
        return Engine("vLLM", None, f"rank {rank} is above its highest --max-lora-rank, {VLLM_RANKS[-1]}")
    if reason := _beside_linear_layers(kinds):
        return Engine("vLLM", None, reason)
    if TRANSPOSED_EXPERTS in kinds and experts == "stacked":
        return Engine("vLLM", None, "these experts are stored transposed; `--experts per-expert` writes what it reads")
    command = f"vllm serve {shlex.quote(base)} --enable-lora"
    if not _has_experts(kinds):
        return Engine("vLLM", f"{command} --lora-modules {shlex.quote(f'{name}={output}')} --max-lora-rank {accepted}")
    # vLLM does not look at the tensors: a wrong declaration loads without a message and answers nonsense.
    module = json.dumps({"name": name, "path": output, "is_3d_lora_weight": experts == "stacked"})
    return Engine(
        "vLLM",
        f"{command} --enable-mixed-moe-lora-format --lora-modules {shlex.quote(module)} --max-lora-rank {accepted}",
        note="It believes `is_3d_lora_weight` without looking at the file. Without --enable-mixed-moe-lora-format the "
        "file must be stacked where its class of the model has `is_3d_moe_weight`, and per-expert elsewhere."
        + ("" if experts == "stacked" else " Every projection of the experts must be adapted."),
    )


def _sglang(rank: int, base: str, name: str, output: str, kinds: Collection[str], experts: ExpertsLayout) -> Engine:
    if reason := _beside_linear_layers(kinds):
        return Engine("SGLang", None, reason)
    if _has_experts(kinds) and experts == "stacked":
        return Engine("SGLang", None, "it leaves out stacked experts; `--experts per-expert` writes what it reads")
    module = shlex.quote(f"{name}={output}")
    return Engine(
        "SGLang",
        f"python -m sglang.launch_server --model-path {shlex.quote(base)} --enable-lora --lora-paths {module} "
        f"--max-lora-rank {rank}",
        note="Start it with --lora-strict-loading, or it leaves out experts that it does not know."
        if _has_experts(kinds)
        else "",
    )


def _llama_cpp(kinds: Collection[str]) -> Engine:
    if others := sorted(set(kinds) - set(GGUF_HOLDS)):
        return Engine("llama.cpp", None, f"a GGUF adapter holds no {' and no '.join(others)}")
    return Engine("llama.cpp", f"gralora export --format gguf, then {_llama_cpp_command('OUT.gguf')}")


def _has_experts(kinds: Collection[str]) -> bool:
    return any(kind.endswith("experts") for kind in kinds)


def _beside_linear_layers(kinds: Collection[str]) -> str | None:
    """Return what is adapted that is no linear layer and no expert, as a reason, or None."""
    others = sorted(kind for kind in set(kinds) - {"linear layers"} if not kind.endswith("experts"))
    return f"it is not known to take adapters of {' and '.join(others)}" if others else None


def _llama_cpp_command(output: str) -> str:
    return f"llama-server -m BASE.gguf --lora {shlex.quote(output)}"
