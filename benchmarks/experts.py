"""Measure the experts of a mixture: forward and training step, and the bytes that autograd keeps.

Contestants are the frozen experts, PEFT's LoRA on `target_parameters`, and gralora, all in transformers' grouped
implementation. About three minutes on two cores.

    python benchmarks/experts.py [--rounds 8] [--r 16 --k 2]
"""

import argparse
from collections import OrderedDict

import peft
import torch
from common import add_options, device, interleaved, keeping_count, table, write
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import gralora

SHAPES = [(32, 512, 256, 64), (32, 512, 256, 1024), (64, 1024, 512, 16)]  # experts, hidden, intermediate, tokens
TOP_K = 4
DTYPES = [torch.float32, torch.bfloat16]
CONTESTANTS = ("base", "PEFT LoRA", "gralora")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def make(contestant, experts, hidden, intermediate, r, k, dtype):
    """Return experts with the contestant's random adapter, float32 parameters, scale 2."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    module = MixtralExperts(config).to(device(), dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = nn.Sequential(OrderedDict(experts=module))
    if contestant == "base":
        return model.requires_grad_(False).experts
    settings = {"r": r, "target_modules": [], "target_parameters": TARGETS}
    if contestant == "PEFT LoRA":
        lora = peft.LoraConfig(**settings, lora_alpha=2 * r, init_lora_weights=False)
        return peft.get_peft_model(model, lora).base_model.model.experts
    ours = gralora.GraloraConfig(**settings, alpha=2 * r, gralora_k=k, init_weights=False)
    return gralora.get_peft_model(model, ours).base_model.model.experts


def measure(shape, dtype, r, k, rounds):
    experts, hidden, intermediate, tokens = shape
    modules = {name: make(name, experts, hidden, intermediate, r, k, dtype) for name in CONTESTANTS}
    x = torch.randn(tokens, hidden, dtype=dtype, device=device())
    chosen = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)]).to(device())
    weights = torch.rand(tokens, TOP_K, dtype=dtype, device=device())
    with_grad, gradient = x.clone().requires_grad_(), torch.randn(tokens, hidden, dtype=dtype, device=device())

    def forward(module):
        with torch.no_grad():
            module(x, chosen, weights)

    def step(module):
        module(with_grad, chosen, weights).backward(gradient)
        with_grad.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    saved = {}
    for name, module in modules.items():
        with keeping_count(module) as kept:
            y = module(with_grad, chosen, weights)
        saved[name] = sum(kept.values())
        y.backward(gradient)
    rows = []
    for phase, function in (("forward", forward), ("train step", step)):
        times = interleaved({name: lambda f=function, m=m: f(m) for name, m in modules.items()}, rounds)
        rows.append({"shape": shape, "dtype": str(dtype)[6:], "phase": phase, "times": times, "saved": saved})
    return rows


def main():
    parser = argparse.ArgumentParser()
    add_options(parser, rounds=10)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--k", type=int, default=2)
    options = parser.parse_args()
    rows = [
        row
        for dtype in DTYPES
        for shape in SHAPES
        for row in measure(shape, dtype, options.r, options.k, options.rounds)
    ]
    lines = []
    for row in rows:
        fastest = {name: times["min"] for name, times in row["times"].items()}
        experts, hidden, intermediate, tokens = row["shape"]
        lines.append(
            [f"E={experts} H={hidden} I={intermediate} T={tokens}", row["dtype"], row["phase"]]
            + [f"{1e3 * fastest['base']:.1f}"]
            + [fastest[name] / fastest["base"] for name in CONTESTANTS[1:]]
            + [row["times"]["gralora"]["median"] / row["times"]["base"]["median"]]
            + [f"{row['saved'][name] / 2**20:.1f}" for name in CONTESTANTS]
        )
    header = ["experts", "dtype", "phase", "base ms", "LoRA/base", "gralora/base", "(medians)"]
    table(header + [f"saved MiB {name}" for name in CONTESTANTS], lines)
    write("experts", [row | {"r": options.r, "k": options.k, "top_k": TOP_K} for row in rows])


if __name__ == "__main__":
    main()
