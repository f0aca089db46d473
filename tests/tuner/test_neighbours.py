"""What other people's code does to a tuner layer."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import MLP, mlp_config, randomise, tiny_llama
from peft import PeftModel, convert_to_lora, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from gralora import GraloraConfig, GraloraLayer, get_peft_model

TOKENS = torch.arange(3, 23)[None]


def config(**changes):
    return GraloraConfig(**({"r": 8, "hybrid_r": 2, "target_modules": ["q_proj", "down_proj"]} | changes))


def adapted_llama(**changes):
    return randomise(get_peft_model(tiny_llama(), config(**changes))).eval()


def test_tools_that_swap_linears_by_type_find_the_base():
    model = adapted_llama()
    expected = model(TOKENS).logits

    class Swapped(nn.Linear):
        pass

    def swap(module):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                other = Swapped(child.in_features, child.out_features, bias=child.bias is not None)
                other.load_state_dict(child.state_dict())
                setattr(module, name, other)
            swap(child)

    swap(model)
    assert not any(type(m) is nn.Linear for m in model.modules())
    torch.testing.assert_close(model(TOKENS).logits, expected)


def encoder(layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["linear1", "linear2"]])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_the_encoder_does_not_pass_the_adapter_by(targets, padded):
    model = randomise(get_peft_model(encoder(), config(target_modules=targets)), 0.3)
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]) if padded else None
    expected = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        result = model.eval()(x, src_key_padding_mask=mask)
        base = encoder().eval()(x, src_key_padding_mask=mask)
    keep = ~mask if padded else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(result[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result[keep], base[keep], atol=1e-2)


@pytest.mark.parametrize("how", ["cpu_offload before", "cpu_offload after", "dispatch after"])
def test_offloaded_models_give_the_same(how, tmp_path):
    model = adapted_llama()
    expected = model(TOKENS).logits
    if how == "cpu_offload before":
        model.save_pretrained(tmp_path)
        base = tiny_llama()
        cpu_offload(base, execution_device="cpu")
        model = get_peft_model(base, config()).eval()
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    elif how == "cpu_offload after":
        cpu_offload(model, execution_device="cpu")
        assert model.base_model.model.model.layers[0].self_attn.q_proj.gralora_A["default"].device.type == "meta"
    else:
        dispatch_model(model, infer_auto_device_map(model, max_memory={"cpu": "1GB"}), force_hooks=True)
    torch.testing.assert_close(model(TOKENS).logits, expected)


def test_merge_of_an_offloaded_model():
    model = adapted_llama()
    expected = model(TOKENS).logits
    cpu_offload(model, execution_device="cpu")
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected)


def test_a_hook_on_the_base_runs():
    model = get_peft_model(MLP(), mlp_config())
    x = torch.randn(3, 12)
    expected = model(x)
    base = model.base_model.model.up.base_layer
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    torch.testing.assert_close(model(x), expected)
    base.register_forward_hook(lambda module, args, output: output + 1)
    assert not torch.equal(model(x), expected)


def test_from_pretrained_with_cpu_offload_is_right_and_with_disk_offload_is_refused(tmp_path):
    model = adapted_llama()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    disk = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=disk, offload_folder=tmp_path / "off")
    with pytest.raises(RuntimeError, match=r"offloaded to disk.*more CPU memory"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded(TOKENS).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(model):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = adapted_llama()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected, found = gradients(model), gradients(checkpointed)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.filterwarnings("ignore:.*barrier:UserWarning")
def test_two_adapters_in_one_ddp_model_over_half_precision():
    model = get_peft_model(tiny_llama().bfloat16(), config())
    model.add_adapter("second", config())
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        ddp(TOKENS, labels=TOKENS).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert all(".default." in name for name in grads)


def test_peft_s_input_dtype_casting_switch_changes_nothing():
    model = get_peft_model(MLP(torch.bfloat16), mlp_config())
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    expected = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), expected)


def test_float8_storage_of_the_adapter():
    layer = get_peft_model(MLP(torch.bfloat16), mlp_config()).base_model.model.up
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    expected = layer(x)
    for name in ("gralora_A", "gralora_B"):
        getattr(layer, name)["default"] = getattr(layer, name)["default"].to(torch.float8_e4m3fn)
    torch.testing.assert_close(layer(x), expected, atol=0.3, rtol=0.1)  # 3 bits of mantissa
    assert layer(x).dtype == torch.bfloat16


def test_parameter_names_that_trl_matches():
    names = [name for name, _ in adapted_llama().named_parameters() if "gralora_" in name]
    assert names
    assert all(".default." in name for name in names)


def test_t5_style_reads_of_weight_and_bias():
    layer = get_peft_model(MLP(), mlp_config()).base_model.model.up
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias


def test_convert_to_lora_of_peft_takes_our_layers():
    model = adapted_llama(r=4, hybrid_r=0)
    lora, state = convert_to_lora(model, rank=8, progressbar=False)
    assert lora.r == 8
    assert len(state) == 2 * sum(isinstance(m, GraloraLayer) for m in model.modules())
