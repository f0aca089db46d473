import json

import pytest
from adapters import CONV1D, adapted, assert_same_outputs
from conftest import tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from gralora import to_lora


def test_the_config_is_what_every_engine_reads(tmp_path):
    model = adapted(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    to_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["down_proj", "q_proj"],
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "fan_in_fan_out": False,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert isinstance(config["lora_alpha"], int)
    assert set(config) <= set(LoraConfig().to_dict())
    keys = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": r".*layers\.0\.(self_attn\.q_proj|mlp\.up_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*"},
    ],
    ids=["regex", "layers", "exclude"],
)
def test_targets_are_named_in_full_where_short_names_would_mean_more(selection, tmp_path):
    model = adapted(**selection)
    export = to_lora(model, tmp_path / "lora")
    assert export.config["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert_same_outputs(loaded, model)


def test_gpt2_needs_no_fan_in_fan_out_in_our_config(tmp_path):
    model = adapted(tiny_gpt2, target_modules=CONV1D)
    assert to_lora(model, tmp_path / "lora").config["fan_in_fan_out"] is False
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    assert_same_outputs(loaded, model)
