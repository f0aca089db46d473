"""A compiled model whose scale changes."""

import pytest
import torch
from conftest import MLP, mlp_config
from peft import LoraConfig, get_peft_model


def graphs(config, scale_layers):
    """Return how many graphs the compiler makes while the scale changes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = get_peft_model(MLP(), config)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(5, 12)
    for scale in (0.5, 0.25, 2.0, 3.0, 0.75, 1.5):
        scale_layers([model.base_model.model.up, model.base_model.model.down], scale)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "scale_layers",
    [
        lambda layers, scale: [layer.set_scale("default", scale) for layer in layers],
        lambda layers, scale: [layer.scale_layer(scale) for layer in layers],
    ],
    ids=["set_scale", "scale_layer"],
)
def test_new_scales_make_no_more_graphs_than_with_lora(scale_layers):
    lora = LoraConfig(r=6, target_modules=["up", "down"], init_lora_weights=False)
    assert graphs(mlp_config(hybrid_r=2), scale_layers) <= graphs(lora, scale_layers) == 2
