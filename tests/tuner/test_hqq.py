"""HQQ in a process of its own, from a folder of its own.

Where HQQ is installed, transformers imports it, and with it a compiler: that must not slow every other test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The folder that the Makefile installs HQQ into.
FOLDER = Path(sys.prefix) / "hqq"

SCRIPT = """
import copy
import sys
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, PeftModel
from torch import nn
import gralora

bits, folder = int(sys.argv[1]), sys.argv[2]

def quantised():
    torch.manual_seed(0)
    dense = nn.Linear(64, 64)
    settings = BaseQuantizeConfig(nbits=bits, group_size=64)
    return nn.ModuleDict({"layer": HQQLinear(dense, settings, compute_dtype=torch.float32, device="cpu")})

def packed(base):
    tensors = {"W_q": base.W_q.data} | {k: v for k, v in base.meta.items() if isinstance(v, torch.Tensor)}
    return {name: tensor.clone() for name, tensor in tensors.items()}

def error_of_merging(config):
    model = gralora.get_peft_model(quantised(), config)
    layer = model.base_model.model["layer"]
    delta = layer.get_delta_weight("default")
    layer.scaling["default"] *= (layer.base_layer.dequantize().abs().mean() / delta.abs().mean()).item()
    exact = layer.base_layer.dequantize() + layer.get_delta_weight("default").detach()
    model.merge_adapter()
    return ((layer.get_base_layer().dequantize() - exact).norm() / exact.norm()).item()

config = gralora.GraloraConfig(r=8, target_modules=["layer"])
model = gralora.get_peft_model(quantised(), config)
layer = model.base_model.model["layer"]
x, target = torch.randn(32, 64), torch.randn(32, 64)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(20):
    loss = (layer(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses

model.save_pretrained(folder)
expected = layer(x)
reloaded = PeftModel.from_pretrained(quantised(), folder)
assert torch.equal(reloaded.base_model.model["layer"](x), expected)

base, before = layer.base_layer, packed(layer.base_layer)
for _ in range(3):
    model.merge_adapter()
    assert layer.base_layer is not base
    assert 0 < (layer(x) - expected).norm() < 0.2 * expected.norm()
    model.unmerge_adapter()
    assert layer.base_layer is base
    after = packed(base)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(layer(x), expected)

with torch.no_grad():
    layer.gralora_B["default"][0, 0, 0] = float("inf")
try:
    model.merge_adapter(safe_merge=True)
except ValueError as error:
    assert "no layer was merged" in str(error), error
else:
    raise AssertionError("a non-finite merge went through")
assert layer.base_layer is base and torch.equal(packed(base)["W_q"], before["W_q"])

settings = {"r": 8, "target_modules": ["layer"]}
ours = error_of_merging(gralora.GraloraConfig(init_weights=False, **settings))
theirs = error_of_merging(LoraConfig(init_lora_weights=False, **settings))
assert ours < 1.2 * theirs, (ours, theirs)
print("whole")
"""


@pytest.mark.parametrize("bits", ["4", "8"])
def test_hqq_trains_saves_reloads_merges_and_unmerges(bits, tmp_path):
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, bits, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.endswith("whole\n")
