import pytest

from gralora.files.names import (
    GRALORA_FACTORS,
    LORA_FACTORS,
    component_of,
    group_keys,
    key_of,
    module_name,
    natural_order,
    split_key,
)


@pytest.mark.parametrize("factors", [GRALORA_FACTORS, LORA_FACTORS])
@pytest.mark.parametrize("module", ["up", "model.layers.10.self_attn.q_proj", "gralora_A.x"])
def test_a_key_is_split_into_what_it_was_built_from(module, factors):
    for factor in factors:
        assert split_key(key_of(module, factor), factors) == (module, factor)


def test_the_keys_are_those_of_peft():
    assert key_of("up", "gralora_A") == "base_model.model.up.gralora_A"
    assert key_of("up", "lora_B.weight", prefix="unet.") == "unet.up.lora_B.weight"


@pytest.mark.parametrize("key", ["base_model.model.lm_head.weight", "base_model.model.up.bias", "my_gralora_A"])
def test_other_keys_are_not_split(key):
    assert split_key(key, GRALORA_FACTORS) is None


def test_the_prefixes_of_peft_and_compile_are_removed():
    assert module_name("base_model.model._orig_mod.layers.0._orig_mod.up") == "layers.0.up"


def test_keys_are_grouped_by_module_in_the_order_of_depth():
    modules = [f"layers.{i}.up" for i in range(12)]
    keys = [key_of(module, factor) for factor in GRALORA_FACTORS[1::-1] for module in reversed(modules)]
    by_module, others = group_keys([*keys, "layers.10.bias", "layers.9.bias"], GRALORA_FACTORS)
    assert list(by_module) == modules
    assert by_module["layers.3.up"] == {f: key_of("layers.3.up", f) for f in GRALORA_FACTORS[:2]}
    assert others == ("layers.9.bias", "layers.10.bias")
    assert max(modules, key=natural_order) == "layers.11.up"


def test_a_unet_is_known_by_the_names_of_its_modules():
    assert component_of(["conv_in", "down_blocks.0.attn.to_q"]) == "unet"
    assert component_of(["transformer_blocks.0.attn.to_q"]) == "transformer"
