"""Measure the time of the dense update, a merge and an unmerge, for one layer and for a whole model.

The updates have the size that training produces: mean |Δ| is 3 % of mean |W|.

    python benchmarks/merge.py [--rounds 8]
"""

import argparse
import statistics
import warnings

import torch
from common import LINEARS, adapt, add_options, device, interleaved, smollm2, table, timed, write
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

RATIO = 0.03
NAMES = ("PEFT LoRA r", "PEFT GraLoRA", "gralora", "gralora, keep_base=False")


def layer_of(name, n, r, k, dtype):
    holder = nn.ModuleDict({"layer": nn.Linear(n, n, bias=False, dtype=dtype, device=device())})
    return scaled(adapt(name.partition(",")[0], holder, r, k, ["layer"])).base_model.model["layer"]


def scaled(model):
    for layer in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
        ratio = layer.get_delta_weight("default").abs().mean() / layer.get_base_layer().weight.abs().mean()
        layer.scaling["default"] *= RATIO / ratio.item()
    return model


def layer_rows(n, r, k, dtype, rounds):
    layers = {name: layer_of(name, n, r, k, dtype) for name in NAMES}
    weights = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}

    def merge(name):
        layer = layers[name]
        if "keep_base" in name:
            layer.merge(keep_base=False)
        else:
            layer.merge()

    def unmerge(name):
        layer = layers[name]
        if "keep_base" in name:
            layer._merges.clear()
            layer.get_base_layer().weight.data.copy_(weights[name])
        else:
            layer.unmerge()

    def cycle(name):
        merge(name)
        unmerge(name)

    common = {"layer": f"{n}²", "r": r, "k": k, "dtype": str(dtype)[6:]}
    deltas = {name: lambda layer=layer: layer.get_delta_weight("default") for name, layer in layers.items()}
    rows = [common | {"what": "delta", "times": interleaved(deltas, rounds)}]
    merged = {}
    for _ in range(rounds + 1):
        for name in NAMES:
            merged.setdefault(name, []).append(timed(lambda name=name: merge(name)))
            unmerge(name)
    rows.append(
        common
        | {
            "what": "merge",
            "times": {n: {"min": min(t[1:]), "median": statistics.median(t[1:])} for n, t in merged.items()},
        }
    )
    cycles = {name: lambda name=name: cycle(name) for name in NAMES[:3]}
    rows.append(common | {"what": "merge and unmerge", "times": interleaved(cycles, rounds)})
    return rows


def model_rows(r, k, rounds):
    models = {name: scaled(adapt(name, smollm2(torch.bfloat16).to(device()), r, k, LINEARS)) for name in NAMES[:3]}

    def cycle(model):
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()

    times = interleaved({name: lambda m=m: cycle(m) for name, m in models.items()}, rounds)
    return [{"layer": "SmolLM2-135M", "r": r, "k": k, "dtype": "bfloat16", "what": "merge and unmerge", "times": times}]


def main():
    parser = argparse.ArgumentParser()
    add_options(parser)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += layer_rows(4096, 128, 4, dtype, rounds)
        rows += layer_rows(2048, 64, 4, dtype, rounds)
    rows += model_rows(32, 2, max(4, rounds // 2))
    lines = []
    for row in rows:
        theirs = row["times"]["PEFT GraLoRA"]["min"]
        for name, times in row["times"].items():
            lines.append(
                [row["layer"], f"{row['r']},{row['k']}", row["dtype"], row["what"], name]
                + [f"{times['min'] * 1e3:.1f}", f"{times['median'] * 1e3:.1f}", times["min"] / theirs]
            )
    table(["weight", "r,k", "dtype", "what", "contestant", "min ms", "median ms", "/PEFT GraLoRA"], lines)
    write("merge", rows)


if __name__ == "__main__":
    main()
