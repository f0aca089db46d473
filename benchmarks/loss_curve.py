"""Measure whether computing the adapter in bfloat16 changes the training loss.

Trains SmolLM2-135M in bfloat16 on the packaged task, with adapters on all linear layers and float32 parameters.
gralora keeps activations in bfloat16; PEFT's GraLoRA casts them to float32 for the adapter. Both use the same initial
values and the same rows. Further seeds of gralora show the variation between seeds.

    python benchmarks/loss_curve.py [--steps 200 --batch 2 --seeds 2]
"""

import argparse
import random
import statistics

import peft
import torch
from common import LINEARS, device, native_peft, smollm2, table, write

import gralora
from gralora import pretrained
from gralora.recipe.data import encode, parse_rows
from gralora.recipe.tasks import support_rows

SETTINGS = {"r": 32, "gralora_k": 2, "alpha": 64, "target_modules": LINEARS}


def make(kind, seed):
    torch.manual_seed(seed)
    ours = gralora.get_peft_model(smollm2(torch.bfloat16).to(device()), gralora.GraloraConfig(**SETTINGS))
    if kind == "gralora":
        return ours
    start = peft.get_peft_model_state_dict(ours)
    with native_peft() as config:
        theirs = peft.get_peft_model(smollm2(torch.bfloat16).to(device()), config(**SETTINGS))
        peft.set_peft_model_state_dict(theirs, start)
    return theirs


def batches(rows, steps, batch, seed):
    """Yield padded token ids, labels and masks, in an order that depends on the seed."""
    order = random.Random(seed)
    shuffled = []
    while len(shuffled) < steps * batch:
        shuffled += order.sample(rows, len(rows))
    for step in range(steps):
        chosen = shuffled[step * batch : (step + 1) * batch]
        longest = max(len(tokens) for tokens, _ in chosen)
        ids, labels = torch.zeros(batch, longest, dtype=torch.long), torch.full((batch, longest), -100)
        mask = torch.zeros(batch, longest, dtype=torch.long)
        for i, (tokens, wanted) in enumerate(chosen):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
            labels[i, : len(tokens)] = torch.tensor(wanted)
        yield {"input_ids": ids.to(device()), "labels": labels.to(device()), "attention_mask": mask.to(device())}


def curve(kind, seed, rows, steps, batch):
    model = make(kind, seed).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    losses = []
    for inputs in batches(rows, steps, batch, seed):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    tokenizer = pretrained.load()[1]
    items = [(f"row {i}", row) for i, row in enumerate(support_rows("train"))]
    encoded = encode(parse_rows(items, "task"), tokenizer, 256, "task")
    examples = list(zip(encoded.input_ids, encoded.labels, strict=True))
    runs = [("gralora", seed) for seed in range(options.seeds)] + [("PEFT GraLoRA", 0)]
    rows = [
        {"contestant": kind, "seed": seed, "losses": curve(kind, seed, examples, options.steps, options.batch)}
        for kind, seed in runs
    ]
    quarter = max(1, options.steps // 4)
    parts = [slice(i * quarter, (i + 1) * quarter) for i in range(4)]
    means = [[statistics.mean(row["losses"][part]) for part in parts] for row in rows]
    table(
        ["contestant", "adapter computed in", "seed", *(f"mean loss, quarter {i}" for i in range(1, 5))],
        [
            [row["contestant"], "bfloat16" if row["contestant"] == "gralora" else "float32", row["seed"]]
            + [f"{mean:.4f}" for mean in line]
            for row, line in zip(rows, means, strict=True)
        ],
    )
    for i in range(4):
        seeds = [line[i] for line in means[:-1]]
        print(f"quarter {i + 1}: dtypes differ by {abs(means[-1][i] - means[0][i]):.4f}", end=", ")
        print(f"seeds by up to {max(seeds) - min(seeds):.4f}")
    write("loss_curve", rows)


if __name__ == "__main__":
    main()
