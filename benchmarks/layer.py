"""Measure the time of one adapted linear layer: forward, and forward and backward.

A full run takes about 40 minutes on two cores. `--again` measures one shape and dtype again and replaces these cells in
the results. Use it if another process disturbed the measurement.

    python benchmarks/layer.py [--rounds 8] [--quick] [--again 2048 2048 float32]
"""

import argparse

import torch
from common import CONTESTANTS, adapt, add_options, device, interleaved, read, table, write
from torch import nn

SHAPES = [(576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (4096, 11008)]
RANKS = [(32, 2), (64, 4), (128, 8)]
TOKENS = [1, 16, 512, 2048]
DTYPES = [torch.bfloat16, torch.float32]


def measure(n_in, n_out, t, r, k, dtype, rounds):
    layers = {}
    for name in CONTESTANTS:
        holder = nn.ModuleDict({"layer": nn.Linear(n_in, n_out, bias=False, dtype=dtype, device=device())})
        model = adapt(name, holder, r, k, ["layer"])
        layers[name] = (model if name == "base" else model.base_model.model)["layer"]
    x = torch.randn(t, n_in, dtype=dtype, device=device())
    with_grad = x.clone().requires_grad_()
    gradient = torch.randn(t, n_out, dtype=dtype, device=device())

    def forward(layer):
        with torch.no_grad():
            layer(x)

    def both(layer):
        layer(with_grad).backward(gradient)

    rows = []
    for phase, function in (("forward", forward), ("forward+backward", both)):
        times = interleaved({name: lambda f=function, m=m: f(m) for name, m in layers.items()}, rounds)
        rows.append(
            {
                "shape": f"{n_in}→{n_out}",
                "t": t,
                "r": r,
                "k": k,
                "dtype": str(dtype)[6:],
                "phase": phase,
                "times": times,
            }
        )
    return rows


def floor_share(n_in, n_out, t, r, itemsize, phase):
    """Return the minimum cost of the adapter, in units of the frozen layer's time.

    That is its FLOPs at the frozen layer's rate. With few tokens it is the bytes of its float32 factors at the frozen
    layer's bandwidth.
    """
    passes = {"forward": 1.0, "forward+backward": 1.5}[phase]  # products: 2 of the base, 3 of each factor
    share = r * (n_in + n_out) / (n_in * n_out)
    return passes * share * (4 / itemsize if t <= 16 else 1)


def main():
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="the shapes of the summary only")
    parser.add_argument("--again", nargs=3, metavar=("IN", "OUT", "DTYPE"), help="replace these cells only")
    options = parser.parse_args()
    shapes = [(576, 1536), (2048, 2048), (4096, 4096)] if options.quick else SHAPES
    ranks = RANKS[:2] if options.quick else RANKS
    tokens = [1, 512] if options.quick else TOKENS
    rows, dtypes, kept = [], DTYPES, []
    if options.again:
        n_in, n_out, dtype = int(options.again[0]), int(options.again[1]), options.again[2]
        shapes, dtypes = [(n_in, n_out)], [getattr(torch, dtype)]
        kept = [row for row in read("layer") if (row["shape"], row["dtype"]) != (f"{n_in}→{n_out}", dtype)]
    for dtype in dtypes:
        for n_in, n_out in shapes:
            for t in tokens:
                for r, k in ranks:
                    rounds = options.rounds * (20 if t <= 16 else 1)
                    rows += measure(n_in, n_out, t, r, k, dtype, rounds)
    lines = []
    for row in rows:
        best = {name: t["min"] for name, t in row["times"].items()}
        ours = best["gralora"]
        itemsize = getattr(torch, row["dtype"]).itemsize
        n_in, n_out = map(int, row["shape"].split("→"))
        row["floor"] = best["base"] * (1 + floor_share(n_in, n_out, row["t"], row["r"], itemsize, row["phase"]))
        lines.append(
            [row["shape"], row["t"], f"{row['r']},{row['k']}", row["dtype"], row["phase"]]
            + [f"{best[name] * 1e3:.3f}" for name in CONTESTANTS]
            + [ours / best["PEFT LoRA r"], ours / best["PEFT GraLoRA"]]
            + [best[name] / row["floor"] for name in CONTESTANTS[1:]]
        )
    table(
        [
            "shape",
            "t",
            "r,k",
            "dtype",
            "phase",
            *(f"{n} ms" for n in CONTESTANTS),
            "/LoRA",
            "/PEFT GraLoRA",
            *(f"{n} /floor" for n in CONTESTANTS[1:]),
        ],
        lines,
    )
    write("layer", kept + rows)


if __name__ == "__main__":
    main()
