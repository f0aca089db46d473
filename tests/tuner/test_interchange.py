"""Checkpoints of this package load in PEFT's own tuner, and the other way round."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from conftest import get_native_peft_model, native_peft, randomise, tiny_gpt2, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gralora import GraloraConfig, GraloraLayer, get_peft_model

CASES = {
    "llama": (tiny_llama, {"r": 8, "gralora_k": 2, "alpha": 16, "target_modules": ["q_proj", "down_proj"]}),
    "llama k=4": (tiny_llama, {"r": 8, "gralora_k": 4, "alpha": 24, "target_modules": ["q_proj", "v_proj"]}),
    "hybrid": (tiny_llama, {"r": 6, "hybrid_r": 3, "gralora_k": 2, "target_modules": ["o_proj", "up_proj"]}),
    "conv1d": (tiny_gpt2, {"r": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d hybrid": (tiny_gpt2, {"r": 8, "hybrid_r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "bias": (tiny_gpt2, {"r": 8, "target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "gralora_only"}),
}
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(params=CASES, ids=CASES)
def case(request):
    return CASES[request.param]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_ours_loads_in_native_and_the_other_way_round(case, tmp_path):
    make, settings = case
    ours = randomise(get_peft_model(make(), GraloraConfig(**settings))).eval()
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(TOKENS).logits
    with native_peft():
        native = PeftModel.from_pretrained(make(), tmp_path / "ours")
        assert not isinstance(native.base_model, type(ours.base_model))
        close(native(TOKENS).logits, expected)
        native.save_pretrained(tmp_path / "native")
    again = PeftModel.from_pretrained(make(), tmp_path / "native")
    assert isinstance(again.base_model, type(ours.base_model))
    assert torch.equal(again(TOKENS).logits, expected)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "native")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "native")]
    for written in configs:
        written["target_modules"] = sorted(written["target_modules"])
    assert configs[0] == configs[1]


def test_a_swapped_block_would_be_seen(tmp_path):
    make, settings = CASES["llama"]
    ours = randomise(get_peft_model(make(), GraloraConfig(**settings)), 0.5).eval()
    ours.save_pretrained(tmp_path)
    layer = next(m for m in ours.modules() if isinstance(m, GraloraLayer))
    with torch.no_grad():
        layer.gralora_B["default"].copy_(layer.gralora_B["default"].flip(0))
    with native_peft():
        native = PeftModel.from_pretrained(make(), tmp_path)
        assert not torch.allclose(native(TOKENS).logits, ours(TOKENS).logits, atol=1e-6)


def test_a_state_dict_of_a_native_model_loads_into_ours(case):
    make, settings = case
    native = randomise(get_native_peft_model(make(), **settings)).eval()
    ours = get_peft_model(make(), GraloraConfig(**settings)).eval()
    result = ours.load_state_dict(native.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    close(ours(TOKENS).logits, native(TOKENS).logits)


def test_delta_weights_are_those_of_native(case):
    make, settings = case
    native = randomise(get_native_peft_model(make(), **settings))
    ours = get_peft_model(make(), GraloraConfig(**settings))
    ours.load_state_dict(native.state_dict())
    theirs = dict(native.named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, GraloraLayer):
            close(layer.get_delta_weight("default"), theirs[name].get_delta_weight("default"))


def test_gradients_are_those_of_native(case):
    make, settings = case
    native = randomise(get_native_peft_model(make(), **settings))
    ours = get_peft_model(make(), GraloraConfig(**settings))
    ours.load_state_dict(native.state_dict())
    for model in (native, ours):
        model.eval()(TOKENS, labels=TOKENS).loss.backward()
    theirs = dict(native.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            key = name if name in theirs else name.removesuffix(".weight")
            torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-5, rtol=1e-4)


def test_a_process_without_gralora_reads_our_files_without_warnings(tmp_path):
    make, settings = CASES["hybrid"]
    base = make()
    base.save_pretrained(tmp_path / "base")
    ours = randomise(get_peft_model(base, GraloraConfig(use_rslora=True, **settings))).eval()
    expected = ours(TOKENS).logits
    ours.save_pretrained(tmp_path / "adapter")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    script = """
import sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
assert "gralora.tuner.model" not in sys.modules and type(model.base_model).__module__.startswith("peft.")
assert not [w for w in seen if "keyword" in str(w.message)], [str(w.message) for w in seen]
with torch.no_grad():
    torch.save(model(torch.load(folder / "tokens.pt")).logits, folder / "logits.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    close(torch.load(tmp_path / "logits.pt"), expected.detach())


def test_transformers_loads_adds_and_saves_adapters(tmp_path):
    make, settings = CASES["hybrid"]
    base = make()
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, GraloraConfig(**settings))).eval()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    assert torch.equal(plain(TOKENS).logits, expected)
    plain.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/adapter_model.safetensors").keys() == (
        load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(again(TOKENS).logits, expected)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh.add_adapter(GraloraConfig(**settings), adapter_name="fresh")
    assert any(".gralora_A.fresh.weight" in name for name, _ in fresh.named_parameters())


def test_auto_peft_model_and_second_load(tmp_path):
    make, settings = CASES["llama"]
    make().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, GraloraConfig(task_type="CAUSAL_LM", **settings))).eval()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(auto(TOKENS).logits, expected)
    auto.load_adapter(tmp_path / "adapter", adapter_name="twin")
    auto.set_adapter("twin")
    assert torch.equal(auto(TOKENS).logits, expected)


def test_saving_while_merged_saves_the_adapter_and_says_so(tmp_path):
    make, settings = CASES["llama"]
    model = randomise(get_peft_model(make(), GraloraConfig(**settings))).eval()
    expected = model(TOKENS).logits
    model.merge_adapter()
    with pytest.warns(UserWarning, match="what is saved is the adapter alone") as seen:
        model.save_pretrained(tmp_path)
    assert sum("adapter alone" in str(w.message) for w in seen) == 1
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(TOKENS).logits, expected)
