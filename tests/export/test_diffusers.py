import pytest
import torch
from adapters import save_adapter
from conftest import randomise
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from gralora import GraloraConfig, get_peft_model
from gralora.export import LoraOptions, to_diffusers


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def tiny_unet():
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def denoise(unet):
    torch.manual_seed(1)
    return unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)).sample


LINEAR = ["to_q", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in"]


@pytest.mark.filterwarnings("ignore:This adapter uses `layer_kinds`")
@pytest.mark.parametrize("as_peft_model", [True, False])
@pytest.mark.parametrize("targets", [LINEAR, [*LINEAR, *CONVOLUTIONS]], ids=["linear", "convolutions"])
def test_diffusers_loads_the_export(targets, as_peft_model, tmp_path):
    config = GraloraConfig(r=8, hybrid_r=1, gralora_k=2, alpha=7, target_modules=targets)
    unet = tiny_unet()
    base = denoise(unet)
    if as_peft_model:
        unet = get_peft_model(unet, config)
        randomise(unet, 0.3).save_pretrained(tmp_path / "adapter")
    else:
        unet.add_adapter(config)
        state = get_peft_model_state_dict(randomise(unet, 0.3))
        (tmp_path / "adapter").mkdir()
        save_file(state, tmp_path / "adapter/adapter_model.safetensors")
        config.save_pretrained(tmp_path / "adapter")
    expected = denoise(unet)
    export = to_diffusers(tmp_path / "adapter", tmp_path / "out", LoraOptions())
    keys = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert max(layer.measured.relative for layer in export.layers) < 1e-6
    fresh = tiny_unet()
    fresh.load_lora_adapter(str(tmp_path / "out"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    # The same map in float32, with the scale folded into B and another order of sums through the UNet.
    torch.testing.assert_close(denoise(fresh), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)


def test_the_component_is_in_the_keys(folder, tmp_path):
    to_diffusers(folder, tmp_path / "a", LoraOptions())
    to_diffusers(folder, tmp_path / "b", LoraOptions(), component="text_encoder")
    for name, component in (("a", "transformer."), ("b", "text_encoder.")):
        keys = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        assert all(key.startswith(component) for key in keys)
    with pytest.raises(ValueError, match=r"`component` must be one of unet, transformer, .*; got component='vae'"):
        to_diffusers(folder, tmp_path / "c", LoraOptions(), component="vae")
