"""What we count on in PEFT: names that may move and signatures that may change with its next release."""

import inspect
from importlib import import_module

import pytest
from peft.utils import PeftType

NAMES = {
    "peft.config": ["PeftConfig"],
    "peft.mapping": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"],
    "peft.tuners.gralora.config": ["GraloraConfig"],
    "peft.tuners.gralora.model": ["GraloraModel"],
    "peft.tuners.tuners_utils": [
        "BaseTuner",
        "BaseTunerLayer",
        "_ExcludedModule",
        "_get_in_out_features",
        "_maybe_include_all_linear_layers",
        "check_adapters_to_merge",
        "onload_layer",
    ],
    "peft.utils": ["PeftType", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"],
    "peft.utils.other": ["get_pattern_key"],
    "peft.utils.quantization_utils": [
        "ForwardOnlyQuantizationBackend",
        "QuantizationBackend",
        "get_quantization_kwargs",
        "resolve_quantization_backend",
    ],
    "peft.utils.save_and_load": ["get_peft_model_state_dict"],
    "peft.utils.transformers_weight_conversion": ["build_peft_weight_mapping"],
    "transformers.core_model_loading": ["WeightRenaming"],
    "transformers.pytorch_utils": ["Conv1D"],
}
OVERRIDDEN = {
    "inject_adapter": ["model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    "merge_adapter": ["adapter_names", "safe_merge"],
    "_unload_and_optionally_merge": ["merge", "progressbar", "safe_merge", "adapter_names"],
    "_check_merge_allowed": [],
    "_check_tied_modules": ["model", "peft_config"],
    "_check_target_module_compatiblity": ["peft_config", "model", "target_name"],
    "_create_and_replace": [
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ],
    "_replace_module": ["parent", "child_name", "new_module", "child"],
    "_get_adapter_state_dict": ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
    "_remove_adapter_name_from_key": ["key", "adapter_name"],
}
CALLED = {
    "_prepare_adapter_config": ["peft_config", "model_config"],
    "_check_target_module_exists": ["peft_config", "key"],
    "_get_module_names_tied_with_embedding": [],
    "get_model_config": ["model"],
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_name_exists(module, name):
    assert hasattr(import_module(module), name)


@pytest.mark.parametrize(("method", "parameters"), (OVERRIDDEN | CALLED).items())
def test_signature_of_the_tuner(method, parameters):
    from peft.tuners.tuners_utils import BaseTuner

    found = [name for name in inspect.signature(getattr(BaseTuner, method)).parameters if name not in ("self", "cls")]
    assert found == parameters


def test_our_overrides_take_what_peft_passes():
    from gralora import GraloraModel

    for method, parameters in OVERRIDDEN.items():
        ours = [p for p in inspect.signature(getattr(GraloraModel, method)).parameters if p not in ("self", "cls")]
        assert ours[: len(parameters)] == parameters


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("merge", ["self", "safe_merge", "adapter_names"]),
        ("unmerge", ["self"]),
        ("set_adapter", ["self", "adapter_names", "inference_mode"]),
        ("enable_adapters", ["self", "enabled"]),
        ("_move_adapter_to_device_of_base_layer", ["self", "adapter_name", "device"]),
        ("supports_lora_conversion", ["self", "adapter_name"]),
    ],
)
def test_signature_of_the_layer(method, parameters):
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert list(inspect.signature(getattr(BaseTunerLayer, method)).parameters) == parameters


def test_weight_mapping_is_looked_up_when_an_adapter_is_loaded():
    from peft.utils import transformers_weight_conversion as conversion

    parameters = inspect.signature(inspect.unwrap(conversion.build_peft_weight_mapping)).parameters
    assert list(parameters) == ["weight_conversions", "adapter_name", "peft_config"]
    source = inspect.getsource(import_module("transformers.integrations.peft"))
    assert "import" in source and "build_peft_weight_mapping" in source
    assert "\nfrom peft.utils.transformers_weight_conversion" not in source
    assert conversion.build_peft_weight_mapping.__module__ == "gralora.tuner.registration"


def test_peft_forwards_its_hooks_and_knows_the_type():
    from peft import PeftModel

    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel)
    assert PeftType.GRALORA == "GRALORA"


def test_fields_of_peft_s_own_config_are_ours_too():
    import dataclasses

    from gralora import GraloraConfig
    from gralora.tuner.config import EXTRA_FIELDS

    native = import_module("peft.tuners.gralora.config").GraloraConfig
    ours = {f.name for f in dataclasses.fields(GraloraConfig)}
    assert ours - {f.name for f in dataclasses.fields(native)} == set(EXTRA_FIELDS)
    assert {f.name for f in dataclasses.fields(native)} <= ours
