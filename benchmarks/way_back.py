"""Measure the bytes that a merge keeps for undo, as a share of the size of the weight.

python benchmarks/way_back.py
"""

import torch
from common import LINEARS, adapt, smollm2, table, write
from torch import nn

RATIOS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def held(layer, ratio):
    layer.set_scale("default", 1.0)
    weight, delta = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default")
    layer.set_scale("default", ratio * float(weight.float().abs().mean() / delta.abs().mean()))
    layer.merge()
    kept = sum(record.nbytes for record in layer._merges)
    layer.unmerge()
    return kept, weight.nbytes


def main():
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for r, k in ((32, 2), (128, 4)):
            holder = nn.ModuleDict({"layer": nn.Linear(1024, 1024, bias=False, dtype=dtype)})
            layer = adapt("gralora", holder, r, k, ["layer"]).base_model.model["layer"]
            shares = {ratio: kept / size for ratio in RATIOS for kept, size in [held(layer, ratio)]}
            rows.append({"weight": "1024²", "dtype": str(dtype)[6:], "r": r, "k": k, "shares": shares})
    model = adapt("gralora", smollm2(torch.bfloat16), 32, 2, LINEARS)
    layers = [module for module in model.modules() if hasattr(module, "_merges")]
    shares = {}
    for ratio in RATIOS:
        pairs = [held(layer, ratio) for layer in layers]
        shares[ratio] = sum(kept for kept, _ in pairs) / sum(size for _, size in pairs)
    rows.append({"weight": "SmolLM2-135M, all linear", "dtype": "bfloat16", "r": 32, "k": 2, "shares": shares})
    table(
        ["weight", "dtype", "r,k", *(f"|Δ|/|W| {ratio:g}" for ratio in RATIOS)],
        [
            [row["weight"], row["dtype"], f"{row['r']},{row['k']}", *(f"{row['shares'][x]:.1%}" for x in RATIOS)]
            for row in rows
        ],
    )
    write("way_back", rows)


if __name__ == "__main__":
    main()
