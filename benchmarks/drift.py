"""Measure how much the base weights change over a thousand merges and unmerges.

Runs the same loop with gralora and with PEFT's own GraLoRA: SmolLM2-135M in bfloat16, adapters on v_proj.
The adapter changes between two merges, as in on-line reinforcement learning.

    python benchmarks/drift.py [--cycles 1000] [--targets v_proj]
"""

import argparse
import time
import warnings

import torch
from common import adapt, device, smollm2, table, write


def weights_of(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "gralora_" not in name}


def contestant(name, r, k, targets):
    torch.manual_seed(0)
    model = adapt(name, smollm2(torch.bfloat16).to(device()), r, k, targets)
    # An update of about 3 % of the weight, by mean absolute value, as after training.
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            share = layer.get_base_layer().weight.detach().abs().mean() / layer.get_delta_weight("default").abs().mean()
            layer.scaling["default"] *= 0.03 * float(share.detach())
    return model


def train_on(model):
    """Move the adapter by half of its norm in a random direction and keep the norm, as training steps would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gralora_" in name:
                size = parameter.norm()
                parameter.add_(torch.randn_like(parameter) * (0.5 * size / parameter.numel() ** 0.5))
                parameter.mul_(size / parameter.norm())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--targets", nargs="+", default=["v_proj"])
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--k", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    marks = sorted({1, 10, 100, options.cycles} & set(range(1, options.cycles + 1)))
    rows = []
    for name in ("PEFT GraLoRA", "gralora"):
        model = contestant(name, options.r, options.k, options.targets)
        before = weights_of(model)
        start, held = time.perf_counter(), None
        for cycle in range(1, options.cycles + 1):
            model.base_model.merge_adapter()
            if name == "gralora" and held is None:
                layers = [m for m in model.modules() if hasattr(m, "_merges")]
                held = sum(r.nbytes for m in layers for r in m._merges) / sum(m.weight.nbytes for m in layers)
            model.base_model.unmerge_adapter()
            train_on(model)
            if cycle in marks:
                after = weights_of(model)
                changed = sum(not torch.equal(before[key], after[key]) for key in before)
                targeted = [key for key in before if "base_layer.weight" in key]
                drift = [
                    ((after[k].float() - before[k].float()).abs().mean() / before[k].float().abs().mean())
                    for k in targeted
                ]
                rows.append(
                    {
                        "contestant": name,
                        "cycles": cycle,
                        "tensors": len(before),
                        "tensors changed": changed,
                        "mean |W - W0| / mean |W0|": float(torch.stack(drift).mean()),
                        "seconds a cycle": (time.perf_counter() - start) / cycle,
                        "way back / weights": held,
                    }
                )
                print(rows[-1], flush=True)
    table(list(rows[0]), [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    write("drift", rows)


if __name__ == "__main__":
    main()
