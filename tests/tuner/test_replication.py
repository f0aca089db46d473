"""Layers that are stacked several times, compared with a model that has as many layers of its own."""

import copy

import peft
import pytest
import torch
from conftest import assert_same_bits, tiny_llama, weights_of
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.layer import gralora_layers

TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
RANGES = [[0, 2], [1, 2], [0, 1]]

pytestmark = pytest.mark.filterwarnings("ignore:This adapter uses `layer_replication`")


def replicated_config(**changes):
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, "layer_replication": RANGES}
    return GraloraConfig(**(settings | changes))


def replicated(**changes):
    return get_peft_model(tiny_llama(), replicated_config(**changes)).eval()


def deep(model):
    """A plain model of four layers with weights of their own, which are those of the model plus its updates."""
    plain = tiny_llama(num_hidden_layers=4)
    own = {name: tensor for name, tensor in tiny_llama().state_dict().items() if ".layers." not in name}
    for place, source in enumerate([0, 1, 1, 0]):
        prefix = f"model.layers.{source}."
        of_layer = {n.removeprefix(prefix): t for n, t in tiny_llama().state_dict().items() if n.startswith(prefix)}
        own |= {f"model.layers.{place}.{name}": tensor.clone() for name, tensor in of_layer.items()}
    for name, layer in gralora_layers(model.base_model.model).items():
        own[f"{name}.weight"] = own[f"{name}.weight"] + layer.get_delta_weight("default")
    plain.load_state_dict(own)
    return plain


def test_every_copy_has_an_adapter_of_its_own():
    model = replicated()
    assert model.config.num_hidden_layers == 4
    assert len(gralora_layers(model)) == 8
    torch.testing.assert_close(model(TOKENS).logits, deep(model)(TOKENS).logits)
    weights = [layer.self_attn.q_proj.base_layer.weight for layer in model.base_model.model.model.layers]
    assert weights[0] is weights[3]
    assert weights[1] is weights[2]


def test_merging_is_right_and_unmerging_gives_the_same_bits():
    """LoRA adds all updates to the shared weight: the test shows it, so it is no oracle."""
    model = replicated()
    expected, before = deep(model)(TOKENS).logits, weights_of(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS).logits, expected)
        model.unmerge_adapter()
        assert_same_bits(before, weights_of(model))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, layer_replication=RANGES)
    lora = peft.get_peft_model(tiny_llama(), config).eval()
    unmerged = lora(TOKENS).logits
    lora.merge_adapter()
    assert (lora(TOKENS).logits - unmerged).norm() > 0.01 * unmerged.norm()


def test_the_merged_model_can_be_saved(tmp_path):
    model = replicated()
    expected = deep(model)(TOKENS).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 4
    torch.testing.assert_close(loaded(TOKENS).logits, expected)


def test_saving_and_loading_on_the_plain_base(tmp_path):
    model = replicated(target_modules="all-linear")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.peft_config["default"].layer_replication == [(0, 2), (1, 2), (0, 1)]


def test_a_second_adapter_finds_the_layers_stacked():
    model = replicated()
    model.add_adapter("second", replicated_config(r=8))
    assert model.config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        model.add_adapter("third", replicated_config(layer_replication=[[0, 2]]))
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        model.add_adapter("third", replicated_config(layer_replication=None))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 3]], r"within the 2 layers of the model; got layer_replication=\[\(0, 3\)\]"),
        ([[1, 1]], "within the 2 layers"),
        ([0, 2], "must be a list of ranges"),
        ("0-2", "must be a list of ranges"),
        ([[0, 1.5]], "must be a list of ranges"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(ranges, message):
    model = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, replicated_config(layer_replication=ranges))
    assert dict(model.named_modules()) == before


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = tiny_llama()
    before, output = dict(model.named_modules()), model(TOKENS).logits
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_peft_model(model, replicated_config(r=10, gralora_k=5))
    assert model.config.num_hidden_layers == 2
    assert dict(model.named_modules()) == before
    assert torch.equal(model(TOKENS).logits, output)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match="needs a model built like Llama, BERT or Falcon; Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), replicated_config(target_modules=["0"]))


def test_settings_of_each_layer_follow(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    types = ["full_attention", "sliding_attention"]
    config = Qwen3Config(**sizes, **heads, layer_types=types, use_sliding_window=True, sliding_window=4)
    model = get_peft_model(copy.deepcopy(Qwen3ForCausalLM(config)), replicated_config()).eval()
    expected = model(TOKENS).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == [types[0], types[1], types[1], types[0]]
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
