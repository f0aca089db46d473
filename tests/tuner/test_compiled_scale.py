"""A compiled model whose scale changes."""

import subprocess
import sys

SCRIPT = """
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
import gralora


def graphs(config, scale_layers):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6))
    model = get_peft_model(base, config)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(5, 12)
    for scale in (0.5, 0.25, 2.0, 3.0, 0.75, 1.5):
        scale_layers([model.base_model.model[i] for i in (0, 2)], scale)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


torch.manual_seed(0)
targets = {"target_modules": ["0", "2"], "r": 6}
lora = LoraConfig(**targets, init_lora_weights=False)
ours = gralora.GraloraConfig(**targets, gralora_k=3, hybrid_r=2, init_weights=False)
for scale_layers in (
    lambda layers, scale: [layer.set_scale("default", scale) for layer in layers],
    lambda layers, scale: [layer.scale_layer(scale) for layer in layers],
):
    assert graphs(ours, scale_layers) <= graphs(lora, scale_layers) == 2
"""


def test_new_scales_make_no_more_graphs_than_with_lora():
    """In a process of its own: the runtime type checks of the tests are not for the compiler."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
