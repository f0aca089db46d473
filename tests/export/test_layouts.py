"""Exports of layers that are not linear, loaded by PEFT's LoRA and compared with merged weights."""

import copy
import json

import peft
import pytest
import torch
from conftest import tiny_llama
from mixtures import MODELS, moe_config, tiny
from safetensors.torch import load_file
from torch import nn

from gralora import GraloraConfig, get_peft_model, to_lora
from gralora.export.convert import LoraOptions
from gralora.export.diffusers import to_diffusers
from gralora.export.gguf import to_gguf
from gralora.files.checkpoint import open_adapter
from gralora.tuner.layer import gralora_layers

TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This adapter uses"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def merged_of(model):
    return copy.deepcopy(model).merge_and_unload()


def strictly_loaded(base, folder):
    """Load a LoRA, and fail if a key finds no place or a layer gets nothing."""
    config = peft.PeftConfig.from_pretrained(folder)
    model = peft.get_peft_model(base, config)
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(folder))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", ["folder", "model"])
def test_stacks_of_experts_in_peft(name, source, tmp_path):
    plain = tiny(name)
    config = moe_config(target_modules=["o_proj"], hybrid_r=2, rank_pattern={"experts.down_proj": 2}, alpha=12)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    for layer in gralora_layers(model).values():
        for factors in (layer.gralora_A, layer.gralora_B):
            factors["default"] = factors["default"].double()
    model.save_pretrained(tmp_path / "adapter")
    export = to_lora(model if source == "model" else tmp_path / "adapter", tmp_path / "lora")
    assert export.rank == 10
    assert export.worst.measured.largest < 1e-6
    loaded = strictly_loaded(copy.deepcopy(plain), tmp_path / "lora").double()
    merged = merged_of(model)
    weights = dict(loaded.merge_and_unload().named_parameters())
    for key, weight in merged.named_parameters():
        torch.testing.assert_close(weights[key], weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        strictly_loaded(copy.deepcopy(plain), tmp_path / "lora").double()(TOKENS).logits, merged(TOKENS).logits,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def saved(tmp_path, name="mixtral", **changes):
    model = get_peft_model(tiny(name, torch.float32), moe_config(**changes)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_of_their_own(name, tmp_path):
    model = saved(tmp_path, name, target_modules=["q_proj"])
    export = to_lora(tmp_path / "adapter", tmp_path / "lora", experts="per-expert")
    tensors, scale = (
        load_file(tmp_path / "lora" / "adapter_model.safetensors"),
        export.config["lora_alpha"] / export.rank,
    )
    assert export.config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert "target_parameters" not in export.config
    for layer_name, layer in gralora_layers(model.base_model.model).items():
        if layer.parameter_name == "weight":
            continue
        stored = layer.get_delta_weight("default")
        matrices = stored.mT if layer.weight_ref().matrix is torch.t else stored
        module = layer.weight_name(layer_name).rpartition(".")[0]
        for expert, delta in enumerate(matrices):
            parts = {"down_proj": delta}
            if layer.parameter_name == "gate_up_proj":
                gate, up = (delta[::2], delta[1::2]) if name == "gpt_oss" else delta.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            for part, expected in parts.items():
                prefix = f"base_model.model.{module}.{expert}.{part}"
                found = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"] * scale
                torch.testing.assert_close(found, expected)


def test_experts_are_compressed_one_by_one(tmp_path):
    model = saved(tmp_path, hybrid_r=1)
    whole = to_lora(tmp_path / "adapter")
    compressed = to_lora(tmp_path / "adapter", tmp_path / "lora", max_rank=4)
    assert (whole.rank, compressed.rank) == (9, 4)
    assert 0 < compressed.relative_error < 1
    by_error = to_lora(tmp_path / "adapter", max_error=compressed.relative_error * 1.001)
    assert by_error.rank == 4
    loaded = strictly_loaded(tiny("mixtral", torch.float32), tmp_path / "lora")
    lost = wanted = 0.0
    merged, weights = merged_of(model), dict(loaded.merge_and_unload().named_parameters())
    plain = dict(tiny("mixtral", torch.float32).named_parameters())
    for key, weight in merged.named_parameters():
        lost += float((weights[key] - weight).detach().double().square().sum())
        wanted += float((weight - plain[key]).detach().double().square().sum())
    assert (lost / wanted) ** 0.5 == pytest.approx(compressed.relative_error, rel=1e-3)


def test_a_router(tmp_path):
    plain = tiny("mixtral", torch.float32)
    config = GraloraConfig(r=4, target_modules=[], target_parameters=["gate.weight"], init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    to_lora(model, tmp_path / "lora")
    loaded = strictly_loaded(copy.deepcopy(plain), tmp_path / "lora")
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [64, 61])
def test_embeddings(vocabulary, tmp_path):
    plain = tiny_llama(vocab_size=vocabulary)
    config = GraloraConfig(r=4, hybrid_r=2, target_modules=["embed_tokens", "q_proj"], init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    export = to_lora(tmp_path / "adapter", tmp_path / "lora")
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    assert export.tensors[f"{key}A"].shape == (10, vocabulary)
    assert export.tensors[f"{key}B"].shape == (32, 10)
    loaded = strictly_loaded(copy.deepcopy(plain), tmp_path / "lora")
    tokens = TOKENS % vocabulary
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.two = nn.Conv2d(8, 4, (1, 3), padding="same")
        self.down = nn.Linear(4, 4)

    def forward(self, x):
        return self.down(self.two(torch.relu(self.one(x))).transpose(1, -1))


@pytest.mark.parametrize("source", ["folder", "model"])
def test_convolutions(source, tmp_path):
    plain = Convolutions()
    config = GraloraConfig(r=4, hybrid_r=2, target_modules=["one", "two", "down"], init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config)
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model if source == "model" else tmp_path / "adapter", tmp_path / "lora")
    loaded, x = strictly_loaded(copy.deepcopy(plain), tmp_path / "lora"), torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_lora_cannot_hold_is_refused(tmp_path):
    grouped = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3, groups=2)})
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    for base, name, reason in (
        (grouped, "conv", "'conv' .*groups"),
        (attention, "attn", "'attn.out_proj.weight' .*twice"),
    ):
        model = get_peft_model(base, GraloraConfig(r=4, target_modules=[name], init_weights=False))
        with pytest.raises(ValueError, match=f"{reason}.* Merge the adapter"):
            to_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("write", [to_gguf, to_diffusers])
def test_programs_that_know_linear_layers_alone(write, tmp_path):
    saved(tmp_path)
    output = tmp_path / ("out.gguf" if write is to_gguf else "out")
    with pytest.raises(ValueError, match=r"experts.down_proj' cannot be exported for .* it is a stack of experts"):
        write(tmp_path / "adapter", output, LoraOptions())
    assert not output.exists()


def test_options_are_checked():
    with pytest.raises(ValueError, match="`experts` must be 'stacked' or 'per-expert'; got experts='both'"):
        LoraOptions(experts="both")
    with pytest.raises(ValueError, match="PEFT knows no experts of their own"):
        LoraOptions(experts="per-expert", target="peft")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda kinds: kinds.clear(), "must fit the config"),
        (lambda kinds: kinds["model.embed_tokens"].update(shape=[64]), "must have the shape of the weight"),
        (lambda kinds: kinds["model.embed_tokens"].update(shape=[90, 32]), "must fit the config"),
        (lambda kinds: kinds["model.embed_tokens"].pop("kind"), "must map names of layers to records with a kind"),
    ],
)
def test_records_that_do_not_fit_are_refused(change, reason, tmp_path):
    plain = tiny_llama(vocab_size=61)
    config = GraloraConfig(r=4, target_modules=["embed_tokens"], init_weights=False)
    get_peft_model(plain, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    change(content["layer_kinds"])
    file.write_text(json.dumps(content))
    if reason == "must fit the config" and not content["layer_kinds"]:
        assert open_adapter(tmp_path).layers["model.embed_tokens"].in_features == 62  # read as a linear layer
        return
    with pytest.raises(ValueError, match=reason):
        open_adapter(tmp_path)


def test_a_stack_without_its_record_is_refused(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["layer_kinds"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`gralora_A` must fit the config .* got shape \[4, 2, 18, 4\]"):
        open_adapter(tmp_path / "adapter")


def test_parameters_are_counted(tmp_path):
    model = saved(tmp_path, hybrid_r=2)
    adapter = open_adapter(tmp_path / "adapter")
    assert sum(layer.parameters for layer in adapter.layers.values()) == model.get_nb_trainable_parameters()[0]
    assert {layer.weight for layer in adapter.layers.values()} == {
        f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    }
