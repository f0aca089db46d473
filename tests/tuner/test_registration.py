import copy
import gc
import importlib
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from conftest import MLP, mlp_config, native_peft
from peft.utils import transformers_weight_conversion

import gralora


def test_importing_is_enough():
    for namespace in (peft, peft.tuners, importlib.import_module("peft.tuners.gralora")):
        assert namespace.GraloraConfig is gralora.GraloraConfig
        assert namespace.GraloraModel is gralora.GraloraModel
    config = peft.get_peft_config({"peft_type": "GRALORA", "r": 8, "exclude_modules": ["x"]})
    assert type(config) is gralora.GraloraConfig


def test_register_is_idempotent_and_unregister_restores():
    script = """
import sys, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as prefixes
from peft.utils import transformers_weight_conversion as conversion
import peft.tuners.gralora as room
def state():
    return (dict(configs), dict(tuners), dict(prefixes), conversion.build_peft_weight_mapping,
            peft.get_peft_model_state_dict, peft.peft_model.get_peft_model_state_dict,
            *(getattr(m, n, None) for m in (peft, peft.tuners, room) for n in dir(room)))
before = state()
import gralora
ours = state()
assert ours != before
gralora.register(); gralora.register()
assert state() == ours
gralora.unregister(); gralora.unregister()
assert state() == before
gralora.register()
assert state() == ours
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_reloading_registers_the_new_classes_once():
    script = """
import importlib, peft, gralora, gralora.tuner.config, gralora.tuner.model, gralora.tuner.registration
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
from peft.utils import PeftType, transformers_weight_conversion as conversion
from transformers.core_model_loading import WeightRenaming
def renamings():
    config = gralora.GraloraConfig()
    mapping = conversion.build_peft_weight_mapping([WeightRenaming("a", "b")], "mine", peft_config=config)
    return sum("gralora_[AB]" in str(entry.source_patterns) for entry in mapping)
tuner = gralora.tuner
for module in (tuner.registration, gralora, tuner.config, tuner.model, tuner.registration, gralora):
    importlib.reload(module)
    assert renamings() == 1
assert configs[PeftType.GRALORA] is peft.GraloraConfig is gralora.GraloraConfig is gralora.tuner.config.GraloraConfig
gralora.unregister()
assert configs[PeftType.GRALORA].__module__ == peft.GraloraModel.__module__.replace("model", "config")
assert "gralora_[AB]" not in str(conversion.build_peft_weight_mapping([], "mine", peft_config=gralora.GraloraConfig()))
assert conversion.build_peft_weight_mapping.__module__ == "peft.utils.transformers_weight_conversion"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_model_from_before_a_reload_is_saved_whole_and_counts_as_alive(tmp_path):
    script = """
import importlib, sys, gralora
from safetensors.torch import load_file
from torch import nn
model = gralora.get_peft_model(nn.Sequential(nn.Linear(8, 8)), gralora.GraloraConfig(r=4, target_modules=["0"]))
for room in ("blocks", "fused", "config", "layer", "model", "registration"):
    importlib.reload(sys.modules["gralora.tuner." + room])
importlib.reload(gralora)
model.save_pretrained(sys.argv[1])
assert len(load_file(sys.argv[1] + "/adapter_model.safetensors")) == 2
try:
    gralora.unregister()
except RuntimeError as error:
    assert "1 GraLoRA layers are alive" in str(error)
else:
    raise AssertionError("accepted")
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("freeze", [False, True])
def test_unregister_is_refused_while_a_model_is_alive(freeze, copied):
    gc.collect()
    before = len(gralora.GraloraLayer.alive)
    model = copied(gralora.get_peft_model(MLP(), mlp_config()))
    gc.collect()
    patched = transformers_weight_conversion.build_peft_weight_mapping
    try:
        if freeze:
            gc.freeze()
        with pytest.raises(RuntimeError, match=rf"{before + 2} GraLoRA layers are alive"):
            gralora.unregister()
    finally:
        gc.unfreeze()
    assert peft.GraloraConfig is gralora.GraloraConfig
    assert transformers_weight_conversion.build_peft_weight_mapping is patched
    del model
    gc.collect()
    assert len(gralora.GraloraLayer.alive) == before


@pytest.mark.parametrize(
    "extra",
    [
        {"rank_pattern": {"up": 3}},
        {"alpha_pattern": {"up": 3}},
        {"k_pattern": {"up": 1}},
        {"use_rslora": True},
        {"exclude_modules": ["down"]},
        {"trainable_token_indices": [1]},
    ],
)
def test_peft_s_own_tuner_is_not_given_what_it_would_drop(extra):
    name = next(iter(extra))
    with native_peft():
        model = peft.get_peft_model(MLP(), mlp_config())
        for put_on in (
            lambda config: peft.get_peft_model(MLP(), config),
            lambda config: peft.inject_adapter_in_model(config, MLP()),
            lambda config: model.add_adapter("second", config),
        ):
            with pytest.raises(ValueError, match=rf"do without fields that it does not know; got {name}=.*register"):
                put_on(mlp_config(**extra))


def test_keys_with_and_without_the_holder_are_understood():
    remove = gralora.GraloraModel._remove_adapter_name_from_key
    assert remove("m.q.gralora_A.default.weight", "default") == "m.q.gralora_A"
    assert remove("m.q.gralora_B.default", "default") == "m.q.gralora_B"
    assert remove("m.q.gralora_A_general.default.weight", "default") == "m.q.gralora_A_general.weight"
    assert remove("m.default.weight", "other") == "m.default.weight"


@pytest.mark.parametrize("name", ["my adapter", "weight", "gralora_A", "up"])
def test_odd_adapter_names_survive_a_round_trip(name, tmp_path):
    base = MLP()
    pristine = copy.deepcopy(base)
    model = gralora.get_peft_model(base, mlp_config(hybrid_r=1), adapter_name=name)
    model.save_pretrained(tmp_path)
    folder = tmp_path / name  # PEFT's place for an adapter that isn't called "default"
    x = torch.randn(3, 12)
    expected = model(x)
    for loaded_as in (name, "default"):
        again = gralora.PeftModel.from_pretrained(copy.deepcopy(pristine), folder, loaded_as)
        assert torch.equal(again(x), expected)
    assert not torch.equal(expected, pristine(x))
