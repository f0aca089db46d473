"""Measure the time of a training step of a whole model.

SmolLM2-135M, adapters on all linear layers, 8 × 96 tokens: forward, backward and an AdamW step.

    python benchmarks/train_step.py [--rounds 8] [--r 32 --k 2]
"""

import argparse

import torch
from common import CONTESTANTS, LINEARS, adapt, add_options, device, interleaved, smollm2, table, write


def contestant(name, dtype, r, k):
    model = adapt(name, smollm2(dtype).to(device()), r, k, LINEARS).train()
    tokens = torch.randint(0, 49152, (8, 96), generator=torch.Generator().manual_seed(0)).to(device())
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None

    def step():
        if optimizer is None:
            # Frozen base whose gradient reaches the first layer, as an adapter on that layer requires.
            embedded = model.get_input_embeddings()(tokens).requires_grad_()
            model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss.backward()
            return
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The adapter's products at the rate of the frozen ones: one forward and two backward; the base has one of each.
    share = 1.5 * sum(p.numel() for p in trainable) / sum(p.numel() for p in matrices)
    return step, share


def main():
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--k", type=int, default=2)
    options = parser.parse_args()
    rows, lines = [], []
    for dtype in (torch.bfloat16, torch.float32):
        steps, shares = {}, {}
        for name in CONTESTANTS:
            steps[name], shares[name] = contestant(name, dtype, options.r, options.k)
        times = interleaved(steps, options.rounds)
        floor = times["base"]["min"] * (1 + shares["gralora"])
        rows.append({"dtype": str(dtype)[6:], "r": options.r, "k": options.k, "times": times, "floor": floor})
        base, lora = times["base"], times["PEFT LoRA r"]
        for name in CONTESTANTS:
            own = times[name]
            lines.append(
                [str(dtype)[6:], name, f"{own['min']:.3f}", f"{own['median']:.3f}", own["min"] / lora["min"]]
                + [own["median"] / lora["median"], own["min"] / times["PEFT GraLoRA"]["min"]]
                + [(own["min"] - base["min"]) / (lora["min"] - base["min"]), own["min"] / floor]
            )
        del steps
    table(
        ["dtype", "contestant", "min s", "median s", "/LoRA", "/LoRA median", "/PEFT GraLoRA", "overhead", "/floor"],
        lines,
    )
    write("train_step", rows)


if __name__ == "__main__":
    main()
