"""Measure the bytes that autograd keeps for the backward pass of a training step.

Counts unique storages that are not parameters: SmolLM2-135M, all linear layers, 8 × 96 tokens, bfloat16. The result is
the same on any machine. On a GPU the table also shows the peak of allocated memory.

    python benchmarks/memory.py [--r 32 --k 2]
"""

import argparse

import torch
from common import CONTESTANTS, LINEARS, adapt, device, keeping_count, smollm2, table, write


def measure(name, r, k):
    model = adapt(name, smollm2(torch.bfloat16).to(device()), r, k, LINEARS).train()
    tokens = torch.randint(0, 49152, (8, 96), generator=torch.Generator().manual_seed(0)).to(device())
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    inputs = {"input_ids": tokens}
    if name == "base":
        inputs = {"inputs_embeds": model.get_input_embeddings()(tokens).requires_grad_()}
    with keeping_count(model) as kept:
        loss = model(**inputs, labels=tokens, use_cache=False).loss
    saved = sum(kept.values())
    loss.backward()
    return {
        "contestant": name,
        "saved": saved,
        "peak": torch.cuda.max_memory_allocated() if device() == "cuda" else None,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--k", type=int, default=2)
    options = parser.parse_args()
    rows = [measure(name, options.r, options.k) for name in CONTESTANTS]
    lora = next(row["saved"] for row in rows if row["contestant"] == "PEFT LoRA r")
    table(
        ["contestant", "saved MiB", "/LoRA", "peak MiB"],
        [
            [row["contestant"], f"{row['saved'] / 2**20:.0f}", row["saved"] / lora]
            + [f"{row['peak'] / 2**20:.0f}" if row["peak"] else "-"]
            for row in rows
        ],
    )
    write("memory", [row | {"r": options.r, "k": options.k} for row in rows])


if __name__ == "__main__":
    main()
