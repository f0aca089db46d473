"""Compare gralora's export to LoRA with PEFT's `convert_to_lora`: time, size and error.

    python benchmarks/export.py [--threads N] [--quick] [--json FILE]

Prints one table for SmolLM2-135M with an adapter on every linear layer, and one for a single layer of 2048². Both
conversions start from the same model in memory and return tensors in memory. The error is that of ΔW in float64,
relative to its Frobenius norm.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import peft
import torch
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import gralora
from gralora import GraloraConfig, GraloraLayer, get_peft_model
from gralora.export import to_lora

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def adapted(model, r, k, alpha, targets):
    config = GraloraConfig(r=r, gralora_k=k, alpha=alpha, target_modules=targets, init_weights=False)
    return get_peft_model(model, config)


def relative_error(model, tensors, scale):
    """Return the error over all layers of the LoRA."""
    lost = whole = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            exact = layer.double().get_delta_weight("default")
            lora_a, lora_b = (tensors[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
            lost += float((scale * (lora_b @ lora_a) - exact).square().sum())
            whole += float(exact.square().sum())
            layer.float()
    return (lost / whole) ** 0.5


def is_copy(model, tensors):
    """Return whether the LoRA holds exactly the values of the adapter, bit for bit, and zeros."""
    for name, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            for letter, stored in (("A", layer.gralora_A["default"]), ("B", layer.gralora_B["default"])):
                written = tensors[f"{name}.lora_{letter}.weight"]
                same_values = written[written != 0].sort().values, stored.detach()[stored != 0].sort().values
                if not torch.equal(*same_values):
                    return False
    return True


def measure(name, model, convert, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rank, scale, tensors = convert(model)
        seconds.append(time.perf_counter() - start)
    return {
        "way": name,
        "rank": rank,
        "seconds": min(seconds),
        "megabytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6,
        "relative_error": relative_error(model, tensors, scale),
        "bit_for_bit": is_copy(model, tensors),
    }


def ours(max_rank=None):
    def convert(model):
        export = to_lora(model, max_rank=max_rank)
        return export.rank, export.config["lora_alpha"] / export.rank, export.tensors

    return convert


def pefts(rank):
    def convert(model):
        config, tensors = convert_to_lora(model, rank=rank)
        return rank, config.lora_alpha / config.r, tensors

    return convert


def compare(title, model, full, compressed, repeats, rows):
    ways = [
        ("ours, exact", ours(), repeats),
        (f"PEFT, rank {full}", pefts(full), 1),
        (f"ours, --max-rank {compressed}", ours(compressed), repeats),
        (f"PEFT, rank {compressed}", pefts(compressed), 1),
    ]
    print(f"\n{title}\n{'':22}{'rank':>6}{'seconds':>12}{'MB':>9}{'relative error':>18}")
    for name, convert, times in ways:
        row = {"case": title} | measure(name, model, convert, times)
        rows.append(row)
        print(
            f"{row['way']:22}{row['rank']:>6}{row['seconds']:>12.4f}{row['megabytes']:>9.1f}{row['relative_error']:>18.2e}",
            flush=True,
        )
    exact, other, ours_low, pefts_low = rows[-4:]
    print(f"exact conversion bit for bit: {exact['bit_for_bit']}; what its error shows is the summation in float64")
    print(
        f"exact conversion: {other['seconds'] / exact['seconds']:.0f} times faster than PEFT's at the same rank; "
        f"compression: {pefts_low['seconds'] / ours_low['seconds']:.0f} times"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two layers of SmolLM2 instead of thirty")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/export-cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    config = AutoConfig.for_model(**SMOLLM2.to_dict())
    if arguments.quick:
        config.num_hidden_layers = 2
    # Only the shapes of the base matter here, not its values.
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = adapted(base, r=32, k=2, alpha=64, targets="all-linear")
    layers = config.num_hidden_layers
    compare(f"SmolLM2-135M, {7 * layers} linear layers, r=32, k=2", model, 64, 16, 3, rows)
    single = adapted(nn.Sequential(nn.Linear(2048, 2048, bias=False)), r=64, k=4, alpha=128, targets=["0"])
    compare("one layer of 2048x2048, r=64, k=4", single, 256, 64, 10, rows)
    written = {
        "device": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "dtype": "float32",
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "gralora": gralora.__version__},
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
