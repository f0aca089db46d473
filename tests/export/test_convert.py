import oracle
import pytest
import torch
from adapters import LLAMA, adapted, assert_same_outputs, edit_tensors, save_adapter
from conftest import tiny_gpt2, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file

from gralora import to_lora
from gralora.files.checkpoint import open_adapter
from gralora.tuner.layer import gralora_layers


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_a_stored_one_where_the_scale_comes_out_whole(dtype, tmp_path):
    model = adapted(r=8, gralora_k=4, alpha=12)
    for layer in gralora_layers(model).values():
        layer.gralora_A.to(dtype), layer.gralora_B.to(dtype)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    export = to_lora(tmp_path / "adapter", tmp_path / "lora")
    assert (export.rank, export.config["lora_alpha"]) == (32, 48)
    written = load_file(tmp_path / "lora/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    A, B = stored[f"{name}.gralora_A"], stored[f"{name}.gralora_B"]
    lora_a, lora_b = written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"]
    assert lora_a.dtype == lora_b.dtype == dtype
    for j in range(4):
        assert torch.equal(lora_a[8 * j : 8 * j + 8, 8 * j : 8 * j + 8], A[j].T)
        for i in range(4):
            rows, columns = slice(8 * i, 8 * i + 8), slice(8 * j + 2 * i, 8 * j + 2 * i + 2)
            assert torch.equal(lora_b[rows, columns], B[i, 2 * j : 2 * j + 2].T)
    assert lora_a.count_nonzero() == A.count_nonzero()
    assert lora_b.count_nonzero() == B.count_nonzero()


def test_factors_multiply_to_the_oracle(folder):
    export, adapter = to_lora(folder), open_adapter(folder)
    for name, layer in adapter.layers.items():
        f = adapter.factors(name)
        a, b = (export.tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = oracle.dense(f.A, f.B, f.A_general, f.B_general, layer.scale)
        # The factors are copies; what differs is the rounding of two float64 products.
        torch.testing.assert_close(b @ a * export.config["lora_alpha"] / export.rank, expected, atol=1e-12, rtol=1e-12)


def test_a_scale_that_lora_alpha_cannot_state_is_folded_in_float32(tmp_path):
    model = adapted(use_rslora=True, alpha=5)
    for layer in gralora_layers(model).values():
        layer.gralora_A.to(torch.bfloat16), layer.gralora_B.to(torch.bfloat16)
    export = to_lora(model, tmp_path / "lora")
    assert export.config["lora_alpha"] == export.rank == 16
    dtypes = {key.split(".")[-2]: tensor.dtype for key, tensor in export.tensors.items()}
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.float32}
    assert max(layer.measured.relative for layer in export.layers) < 1e-7


def test_layers_come_in_the_order_of_depth():
    model = adapted(lambda: tiny_llama(num_hidden_layers=11), target_modules=["q_proj"])
    assert [layer.name.split(".")[2] for layer in to_lora(model).layers] == [str(i) for i in range(11)]


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    model = adapted()
    layer = next(iter(gralora_layers(model).values()))
    with torch.no_grad():
        layer.gralora_A["default"][0, 0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"`dtype` must hold every value; got dtype=torch.float16 with 1e\+06 at 'model"
    ):
        to_lora(model, tmp_path / "lora", dtype=torch.float16)
    assert not any(tmp_path.iterdir())


def test_biases_modules_and_tokens_are_refused_for_serving_and_carried_over_for_peft(tmp_path):
    cases = {
        "bias": ({"bias": "gralora_only"}, r"bias='gralora_only', with 6 trained biases"),
        "modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        "tokens": ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices="),
    }
    for name, (settings, message) in cases.items():

        def make(name=name):
            return tiny_gpt2() if name == "bias" else tiny_llama()

        targets = ["c_fc", "c_proj"] if name == "bias" else LLAMA
        fan = {"fan_in_fan_out": True} if name == "bias" else {}
        model = adapted(make, target_modules=targets, **settings, **fan)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        with pytest.raises(
            ValueError, match=f"must hold factors alone; got {message}.*`gralora merge`.*`target='peft'`"
        ):
            to_lora(model, tmp_path / name)
        assert not (tmp_path / name).exists()
        to_lora(model, tmp_path / name, target="peft")
        loaded = PeftModel.from_pretrained(make(), tmp_path / name).eval()
        assert_same_outputs(loaded, model)


def test_resized_embeddings_in_the_file_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"factors alone; got also 'base_model.model.lm_head.weight' in"):
        to_lora(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "`max_rank` must be a positive integer; got max_rank=0"),
        ({"max_rank": True}, "`max_rank` must be a positive integer; got max_rank=True"),
        ({"max_error": "low"}, r"`max_error` must be in \[0, 1\); got max_error='low'"),
        ({"max_error": 1.5}, r"`max_error` must be in \[0, 1\); got max_error=1.5"),
        ({"per_layer": True}, r"`per_layer` must come with `max_error`\.$"),
        ({"dtype": torch.int8}, "`dtype` must be float32, bfloat16 or float16; got dtype=torch.int8"),
        ({"target": "ollama"}, "`target` must be 'serving' or 'peft'; got target='ollama'"),
        ({"max_rank": 2, "max_error": 0.1}, r"`max_rank` must be at least \d+ for max_error=0.1; got max_rank=2, with"),
        ({"adapter_name": "other"}, r"`adapter_name` must be one of \['default'\]; got adapter_name='other'"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_lora(adapted(), tmp_path / "lora", **options)
    assert not any(tmp_path.iterdir())
