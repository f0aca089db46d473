import json
import math

import pytest
import torch
from adapters import (
    CONFIG,
    CONV1D,
    TENSORS,
    TOKENS,
    assert_same_outputs,
    lora,
    read_config,
    save_adapter,
)
from conftest import randomise, tiny_gpt2, tiny_llama
from mixtures import EXPERTS, MODELS, tiny
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft import get_peft_model as get_any_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gralora import from_lora, to_lora
from gralora.tuner.layer import gralora_layers


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"use_rslora": True}),
        (tiny_llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        (tiny_gpt2, {"target_modules": CONV1D, "fan_in_fan_out": True, "bias": "lora_only"}),
        (tiny_llama, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["plain", "rslora", "patterns", "conv1d with biases", "modules"],
)
def test_a_lora_becomes_a_gralora_of_the_same_map(make, settings, k, tmp_path, recwarn):
    model = lora(make, **settings)
    model.save_pretrained(tmp_path / "lora")
    adapter = from_lora(tmp_path / "lora", tmp_path / "gralora", k=k)
    assert (adapter.config["r"], adapter.config["hybrid_r"], adapter.config["gralora_k"]) == (4 * k, 0, k)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "gralora").eval()
    assert gralora_layers(loaded)
    assert_same_outputs(loaded, model)


def test_every_block_holds_the_loras_factors():
    model = lora()
    tensors = get_peft_model_state_dict(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    lora_a, lora_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    ours = from_lora(model, k=2).tensors
    A, B = ours[f"{name}.gralora_A"], ours[f"{name}.gralora_B"]
    for i in range(2):
        for j in range(2):
            assert torch.equal(A[j][:, i * 4 : i * 4 + 4], lora_a[:, j * 16 : j * 16 + 16].T)
            assert torch.equal(B[i][j * 4 : j * 4 + 4], lora_b[i * 16 : i * 16 + 16].T)


def test_a_lora_becomes_the_hybrid_part(tmp_path):
    model = lora()
    adapter = from_lora(model, tmp_path / "gralora", k=4, hybrid=True, r=8)
    assert (adapter.config["r"], adapter.config["hybrid_r"]) == (8, 4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "gralora", is_trainable=True).eval()
    assert_same_outputs(loaded, model)
    loaded(TOKENS, labels=TOKENS).loss.backward()
    layer = next(iter(gralora_layers(loaded).values()))
    assert layer.gralora_A["default"].any()
    assert not layer.gralora_B["default"].any()
    assert layer.gralora_B["default"].grad.any()


def test_out_and_in_again_is_the_same_map(folder, tmp_path):
    to_lora(folder, tmp_path / "lora")
    from_lora(tmp_path / "lora", tmp_path / "again", k=2)
    models = [PeftModel.from_pretrained(tiny_llama(), path).eval() for path in (folder, tmp_path / "again")]
    assert_same_outputs(*models)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"use_dora": True}, {}, "`use_dora` must not be used in a LoRA to be converted; got use_dora=True"),
        (
            {},
            {"k": 5},
            r"`k` must divide in_features=48 and out_features=32 at 'model.layers.0.mlp.down_proj'; got k=5",
        ),
        ({}, {"k": 0}, "`k` must be a positive integer; got k=0"),
        ({}, {"r": 4}, "`r` must come with `hybrid`"),
        ({}, {"hybrid": True, "r": 3}, "`k` must divide `r`; got k=2 with r=3"),
        ({}, {"hybrid": True, "r": 0}, "`r` must be a positive integer; got r=0"),
        ({}, {"hybrid": True, "r": 2.5}, "`r` must be a positive integer; got r=2.5"),
        ({"rank_pattern": {"q_proj": 2}}, {"hybrid": True}, "`hybrid` must be off for a LoRA with `rank_pattern`"),
        ({"target_modules": ["embed_tokens"]}, {}, "must adapt linear layers alone; got .*lora_embedding_A"),
    ],
)
def test_a_lora_that_cannot_be_converted_is_refused(settings, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_lora(lora(**settings), tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": None}, "positive integer as rank 'r'; got None"),
        ({"r": "3"}, "positive integer as rank 'r'; got '3'"),
        ({"r": 0}, "positive integer as rank 'r'; got 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "positive integer as rank 'q_proj'; got 2.5"),
        ({"lora_alpha": None}, "number as alpha 'lora_alpha'; got None"),
        ({"alpha_pattern": {"q_proj": "1"}}, "number as alpha 'q_proj'; got '1'"),
    ],
)
def test_a_config_without_rank_or_alpha_is_refused(changes, message, hybrid, tmp_path):
    lora().save_pretrained(tmp_path / "lora")
    config = {name: value for name, value in (read_config(tmp_path / "lora") | changes).items() if value is not None}
    (tmp_path / "lora" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"The config of '.*/lora' must have a {message}"):
        from_lora(tmp_path / "lora", hybrid=hybrid)


def test_a_damaged_lora_is_refused(tmp_path, folder):
    lora().save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / TENSORS
    whole = load_file(file)
    key = next(key for key in whole if "lora_A" in key)
    for change, message in (
        ({key: whole[key][:3].contiguous()}, "must have matrices of one rank"),
        ({key: whole[key] * math.nan}, "must be finite; it holds nan or inf"),
    ):
        save_file(whole | change, file)
        with pytest.raises(ValueError, match=message):
            from_lora(tmp_path / "lora")
    save_file({name: tensor for name, tensor in whole.items() if name != key}, file)
    with pytest.raises(ValueError, match="must hold `lora_A` and `lora_B` of every adapted module"):
        from_lora(tmp_path / "lora")
    wrong = {n: torch.cat([t, t], 0 if "lora_A" in n else 1) for n, t in whole.items()}
    save_file(wrong, file)
    with pytest.raises(ValueError, match="must be of rank 4, as its config says; got 8"):
        from_lora(tmp_path / "lora")
    with pytest.raises(ValueError, match="must hold a LoRA adapter; its config says peft_type='GRALORA'"):
        from_lora(folder)


def lora_of_experts(name, **changes):
    settings = {"r": 4, "lora_alpha": 6, "target_parameters": list(EXPERTS)} | changes
    settings.setdefault("target_modules", ["kv_b_proj"] if name == "deepseek_v3" else ["q_proj"])
    return randomise(get_any_peft_model(tiny(name), LoraConfig(**settings)), 0.2).eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # though PEFT uses them
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("arguments", [{"k": 2}, {"k": 4, "hybrid": True}], ids=["blocks", "hybrid"])
def test_a_lora_of_experts_becomes_a_gralora_of_the_same_map(name, arguments, tmp_path):
    changes = {} if arguments.get("hybrid") else {"rank_pattern": {"experts.down_proj": 2}}
    model = lora_of_experts(name, **changes)
    model.save_pretrained(tmp_path / "lora")
    adapter = from_lora(tmp_path / "lora", tmp_path / "gralora", **arguments)
    assert {record["parameter"] for record in adapter.config["layer_kinds"].values()} == {"gate_up_proj", "down_proj"}
    loaded = PeftModel.from_pretrained(tiny(name), tmp_path / "gralora").eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        torch.testing.assert_close(loaded(TOKENS).logits, expected, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(tiny(name)(TOKENS).logits, expected, atol=1e-3)
    to_lora(tmp_path / "gralora", tmp_path / "again")
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="it was imported from a LoRA, which does not tell how gate and up are stored"):
        to_lora(tmp_path / "gralora", experts="per-expert")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("targets", [["gate.weight"], ["down_proj", "gate.weight"], ["gate_up_proj", "down_proj"]])
def test_parameters_are_found_by_any_of_their_names(targets, tmp_path):
    model = lora_of_experts("mixtral", target_parameters=targets, target_modules=[])
    from_lora(model, tmp_path / "gralora")
    loaded = PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "gralora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_a_lora_of_transformers_4_is_refused_with_a_way_out_that_works(tmp_path):
    ours = lora_of_experts("mixtral")
    from_lora(ours, tmp_path / "gralora")
    tuned = PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "gralora").eval()
    to_lora(tuned, tmp_path / "old", experts="per-expert")
    with pytest.raises(
        ValueError, match=r"adapts 'model.layers.0.block_sparse_moe.experts.0.w1', a layer of a single expert"
    ):
        from_lora(tmp_path / "old")
    loaded = PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "old")
    loaded.save_pretrained(tmp_path / "new")
    from_lora(tmp_path / "new", tmp_path / "again", k=2)
    again = PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, ours(TOKENS).logits, atol=1e-6, rtol=1e-6)


def test_parameters_whose_order_is_not_known_are_refused(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))

    model = nn.ModuleDict({"two": Two()})
    config = LoraConfig(target_modules=[], target_parameters=["two.first", "two.second"])
    with pytest.raises(ValueError, match=r"must name the 2 adapted parameters of 'two', and several only of experts"):
        from_lora(get_any_peft_model(model, config))


def test_a_lora_of_attention_is_refused():
    model = get_any_peft_model(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), LoraConfig(target_modules="attn"))
    with pytest.raises(ValueError, match=r"A LoRA of attention modules cannot be converted; got 'attn.base_layer"):
        from_lora(model)
