import dataclasses
import importlib
import json
import math

import pytest
from peft import PeftConfig
from peft.utils import PeftType

from gralora import GraloraConfig


def test_defaults_are_those_of_the_table():
    config = GraloraConfig()
    expected = {
        "r": 32,
        "hybrid_r": 0,
        "alpha": 64,
        "gralora_dropout": 0.0,
        "gralora_k": 2,
        "target_modules": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "peft_type": PeftType.GRALORA,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"`r` must be a positive integer; got r=0"),
        ({"r": 8.0}, r"`r` must be a positive integer; got r=8.0"),
        ({"r": True}, r"`r` must be a positive integer; got r=True"),
        ({"hybrid_r": -1}, r"`hybrid_r` must be zero or a positive integer; got hybrid_r=-1"),
        ({"gralora_k": 0}, r"`gralora_k` must be a positive integer; got gralora_k=0"),
        ({"r": 10, "gralora_k": 4}, r"`gralora_k` must divide `r`; got gralora_k=4 with r=10.*1, 2, 5, 10"),
        ({"alpha": 0}, r"`alpha` must be a finite positive number; got alpha=0"),
        ({"alpha": math.nan}, r"`alpha` must be a finite positive number; got alpha=nan"),
        ({"alpha": "64"}, r"`alpha` must be a finite positive number; got alpha='64'"),
        ({"gralora_dropout": 1.0}, r"`gralora_dropout` must be in \[0, 1\); got gralora_dropout=1.0"),
        ({"gralora_dropout": -0.1}, r"`gralora_dropout` must be in \[0, 1\)"),
        ({"bias": "lora_only"}, r"`bias` must be 'none', 'all' or 'gralora_only'; got bias='lora_only'"),
        ({"init_weights": "pissa"}, r"`init_weights` must be True or False; got init_weights='pissa'"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern\['q'\]` must be a positive integer"),
        ({"alpha_pattern": {"q": math.inf}}, r"`alpha_pattern\['q'\]` must be a finite positive number"),
        ({"k_pattern": ["q"]}, r"`k_pattern` must map module names to values"),
        ({"target_modules": 3}, r"`target_modules` must be a list of names"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, r"`layers_to_transform` must not be given"),
        ({"target_modules": "q.*", "layers_pattern": "h"}, r"`layers_pattern` must not be given"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, r"`layers_pattern` must come with `layers_to_transform`"),
        ({"task_type": "NONSENSE"}, r"Invalid task type"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GraloraConfig(**values)


def test_scaling():
    assert GraloraConfig(r=32, hybrid_r=16, alpha=96).settings_for("q").scale == 2.0
    assert GraloraConfig(r=12, hybrid_r=4, alpha=8, use_rslora=True).settings_for("q").scale == 2.0


def test_patterns_reach_the_layers_they_match():
    config = GraloraConfig(
        r=8, alpha=16, rank_pattern={"q_proj": 16, r"layers\.1\..*": 4}, k_pattern={"q_proj": 4}, alpha_pattern={"v": 1}
    )
    q, other, v = (config.settings_for(name) for name in ("m.layers.0.q_proj", "m.layers.1.o_proj", "v"))
    assert (q.r, q.gralora_k, q.alpha) == (16, 4, 16)
    assert (other.r, other.gralora_k) == (4, 2)
    assert v.alpha == 1


def test_patterns_that_do_not_fit_name_the_layer():
    config = GraloraConfig(r=8, k_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match=r"gralora_k=3 with r=8 at 'm.q_proj'.*1, 2, 4, 8"):
        config.settings_for("m.q_proj")


def test_target_lists_become_sets():
    config = GraloraConfig(target_modules=["q", "v", "q"], exclude_modules=["k"])
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"k"}


def test_file_has_only_fields_that_plain_peft_knows(tmp_path):
    native = importlib.import_module("peft.tuners.gralora.config").GraloraConfig
    GraloraConfig(r=16, alpha=8.5, target_modules=["v", "q"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == native().to_dict().keys()
    assert written["target_modules"] == ["q", "v"]
    assert native(**written).to_dict() == native(r=16, alpha=8.5, target_modules=["v", "q"]).to_dict() | {
        "inference_mode": False
    }


@pytest.mark.parametrize("alpha", [1, 7.3, 64, 1e-3])
@pytest.mark.parametrize(("r", "hybrid_r"), [(32, 0), (24, 7), (6, 1)])
def test_uniform_rslora_is_written_as_plain_alpha(tmp_path, alpha, r, hybrid_r):
    config = GraloraConfig(r=r, hybrid_r=hybrid_r, alpha=alpha, use_rslora=True)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert not loaded.use_rslora
    assert "use_rslora" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert loaded.settings_for("q").scale == pytest.approx(config.settings_for("q").scale, rel=3e-16)


def test_fields_of_our_own_are_announced_and_survive(tmp_path):
    config = GraloraConfig(rank_pattern={"q": 8}, trainable_token_indices=[1, 2], exclude_modules=["k"])
    with pytest.warns(
        UserWarning, match="`exclude_modules`, `rank_pattern`, `trainable_token_indices`.*import gralora"
    ):
        config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is GraloraConfig
    assert dataclasses.asdict(loaded) == dataclasses.asdict(config)


def test_native_config_is_copied_and_checked():
    native = importlib.import_module("peft.tuners.gralora.config").GraloraConfig
    copied = GraloraConfig.copy_of(native(r=16, target_modules=["q"], modules_to_save=["head"]))
    assert (copied.r, copied.target_modules, copied.modules_to_save) == (16, {"q"}, ["head"])
    broken = native(r=16, target_modules=["q"])
    broken.r = -1
    with pytest.raises(ValueError, match="`r` must be a positive integer"):
        GraloraConfig.copy_of(broken)


def test_a_copy_shares_nothing():
    config = GraloraConfig(target_modules=["q"], rank_pattern={"q": 8})
    copied = GraloraConfig.copy_of(config)
    copied.target_modules.add("v")
    copied.rank_pattern["v"] = 4
    assert config.target_modules == {"q"}
    assert config.rank_pattern == {"q": 8}


def test_a_config_of_ours_is_adopted_as_it_is_and_checked():
    config = GraloraConfig(target_modules=["q"])
    assert GraloraConfig.adopt(config) is config
    config.alpha = 0
    with pytest.raises(ValueError, match="`alpha` must be a finite positive number; got alpha=0"):
        GraloraConfig.adopt(config)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("asked", [None, ["pooler"]])
def test_heads_that_peft_adds_to_a_native_config_reach_the_converted_one(task_type, asked):
    native = importlib.import_module("peft.tuners.gralora.config").GraloraConfig
    config = native(target_modules=["q"], modules_to_save=asked, task_type=task_type)
    adopted = GraloraConfig.adopt(config)
    config.modules_to_save.extend(["head"])
    assert adopted.modules_to_save == [*(asked or []), "head"]
