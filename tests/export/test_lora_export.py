import pytest
import torch
from adapters import CONV1D, LLAMA, adapted, assert_same_outputs, save_adapter
from conftest import get_native_peft_model, randomise, tiny_gpt2, tiny_llama
from peft import PeftModel

from gralora import to_lora


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, LLAMA), (tiny_gpt2, CONV1D)], ids=["linear", "conv1d"])
def test_pefts_lora_with_the_export_is_our_adapter(make, targets, k, hybrid_r, tmp_path):
    changes = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
    model = adapted(make, gralora_k=k, hybrid_r=hybrid_r, target_modules=targets, **changes)
    export = to_lora(model, tmp_path / "lora")
    assert export.rank == 8 * k + hybrid_r
    loaded = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert_same_outputs(loaded, model)
    # Copied values: what differs is the order of summation in float64; with hybrid_r the scale is rounded to float32.
    assert export.worst.measured.largest < (1e-7 if hybrid_r else 1e-16)


def test_a_model_and_its_folder_give_the_same_export(folder):
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    a, b = to_lora(folder), to_lora(model)
    assert a.config == b.config | {"base_model_name_or_path": a.config["base_model_name_or_path"]}
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def test_layers_of_other_ranks_and_scales_are_padded_and_folded(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 4}, "k_pattern": {"v_proj": 4}, "alpha_pattern": {"down_proj": 7}}
    model = adapted(**patterns)
    export = to_lora(model, tmp_path / "lora")
    assert export.rank == 32
    assert {tensor.shape[0] for key, tensor in export.tensors.items() if "lora_A" in key} == {32}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert_same_outputs(loaded, model)


def test_an_adapter_of_pefts_own_tuner_is_exported_too(tmp_path):
    native = randomise(get_native_peft_model(tiny_llama(), r=8, target_modules=LLAMA)).eval()
    native.save_pretrained(tmp_path / "native")
    to_lora(tmp_path / "native", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert_same_outputs(loaded, native)
