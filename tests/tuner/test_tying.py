"""An embedding and an output layer with one weight and one adapter (`ensure_weight_tying`)."""

import copy

import oracle
import pytest
import torch
from conftest import assert_same_bits, tiny_gpt2, tiny_llama, weights_of
from contract import copy_by_pickle
from peft import PeftModel
from safetensors.torch import load_file

from gralora import GraloraConfig, get_peft_model, to_lora
from gralora.tuner.tying import TiedLinear

TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings(
    "ignore:This adapter uses",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:You have requested",
    "ignore:Input and output embeddings are no longer tied",
)


def base(kind="llama", dtype=torch.float32):
    """A model with tied weights; the vocabulary of GPT-2 cannot be divided."""
    if kind == "llama":
        return tiny_llama(tie_word_embeddings=True).to(dtype)
    model = tiny_gpt2().to(dtype)
    model.resize_token_embeddings(61)
    return model.eval()


NAMES = {"llama": "embed_tokens", "gpt2": "wte"}
kinds = pytest.mark.parametrize("kind", NAMES)


def tied(kind="llama", dtype=torch.float32, **changes):
    settings = {"r": 4, "hybrid_r": 2, "target_modules": [NAMES[kind]], "init_weights": False}
    return get_peft_model(
        base(kind, dtype), GraloraConfig(**(settings | {"ensure_weight_tying": True} | changes))
    ).eval()


def both(model):
    inner = model.base_model.model
    return inner.get_input_embeddings(), inner.get_output_embeddings()


def with_dense_weight(model, kind, *names, dtype=torch.float32):
    """A plain model whose one weight is that of the base plus the updates of the embedding."""
    plain = base(kind, dtype)
    with torch.no_grad():
        for name in names or ("default",):
            plain.get_input_embeddings().weight += both(model)[0].get_delta_weight(name)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    return plain


@kinds
def test_outputs_and_gradients_are_those_of_one_dense_weight(kind):
    model = tied(kind, torch.float64)
    embedding, output = both(model)
    assert isinstance(output, TiedLinear)
    factors = [f.data.double() for f in embedding.factors("default")]
    for container, factor in zip((embedding.gralora_A, embedding.gralora_B), factors, strict=False):
        container["default"] = factor
    for container, factor in zip((embedding.gralora_A_general, embedding.gralora_B_general), factors[2:], strict=True):
        container["default"].weight = torch.nn.Parameter(factor)
    plain = with_dense_weight(model, kind, dtype=torch.float64).requires_grad_(True)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-6)
    model(TOKENS, labels=TOKENS).loss.backward()
    plain(TOKENS, labels=TOKENS).loss.backward()
    gradient = plain.get_input_embeddings().weight.grad
    leaves = [f.detach().clone().requires_grad_() for f in embedding.factors("default")]
    delta = oracle.dense(*leaves, embedding.scaling["default"])[:, : len(gradient)].T
    (delta * gradient).sum().backward()
    for leaf, factor in zip(leaves, embedding.factors("default"), strict=True):
        torch.testing.assert_close(factor.grad, leaf.grad, rtol=1e-4, atol=1e-7)


@kinds
def test_there_is_one_set_of_parameters(kind, tmp_path):
    model = tied(kind)
    embedding, output = both(model)
    assert not [name for name, _ in output.named_parameters() if "gralora_" in name]
    count = sum(factor.numel() for factor in embedding.factors("default"))
    assert model.get_nb_trainable_parameters()[0] == count
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
    loaded = PeftModel.from_pretrained(base(kind), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["lm_head", "q_proj"], r".*(lm_head|q_proj)", ["embed_tokens", "lm_head"]]
)
def test_naming_either_ties_both(targets, tmp_path):
    model = tied(target_modules=targets)
    embedding, output = both(model)
    assert output.gralora_A._modules["default"]._source[0] is embedding.gralora_B._modules["default"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_bfloat16_base_does_not_break_the_tie():
    """In PEFT's LoRA the cast makes two parameters of one, and training moves them apart."""
    model = tied(dtype=torch.bfloat16, init_weights=True).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    embedding, output = both(model)
    assert embedding.gralora_A["default"].dtype == torch.float32
    assert embedding.get_delta_weight("default").any()
    torch.testing.assert_close(output.get_delta_weight("default"), embedding.get_delta_weight("default"))


@kinds
def test_merging_changes_both_alike_and_unmerging_gives_the_bits_back(kind):
    model = tied(kind)
    expected, before = model(TOKENS).logits, weights_of(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        embedding, output = both(model)
        torch.testing.assert_close(embedding.base_layer.weight, output.base_layer.weight)
        model.unmerge_adapter()
        assert_same_bits(before, weights_of(model))
        assert both(model)[0].base_layer.weight is both(model)[1].base_layer.weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", [copy.deepcopy, copy_by_pickle])
def test_copies_are_tied_in_themselves(through):
    model = tied()
    twin = through(model)
    embedding, output = both(twin)
    assert output.gralora_A._modules["default"]._source[0] is embedding.gralora_B._modules["default"]
    assert output.gralora_A._modules["default"]._source[0] is not both(model)[0].gralora_B._modules["default"]
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


def test_several_adapters_switching_and_deleting():
    model = tied()
    model.add_adapter(
        "second", GraloraConfig(r=8, target_modules=["embed_tokens"], ensure_weight_tying=True, init_weights=False)
    )
    model.base_model.set_adapter(["default", "second"])
    plain = with_dense_weight(model, "llama", "default", "second")
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base()(TOKENS).logits)
    model.delete_adapter("default")
    model.set_adapter("second")
    torch.testing.assert_close(
        model(TOKENS).logits, with_dense_weight(model, "llama", "second")(TOKENS).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_output_layer_with_an_adapter_of_its_own_cannot_be_tied():
    untied = get_peft_model(base(), GraloraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must be the same for all adapters on 'lm_head'"):
        untied.add_adapter("tied", GraloraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True))


def test_scaling_moves_both():
    model = tied()
    for layer in both(model):
        layer.set_scale("default", 3.0)
    plain = base()
    with torch.no_grad():
        plain.get_input_embeddings().weight += both(model)[0].get_delta_weight("default")
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys while loading the checkpoint")
def test_programs_that_serve_lora_do_not_tie(tmp_path):
    model = tied()
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        to_lora(model)
    to_lora(model, tmp_path / "lora", target="peft")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_without_tied_weights_there_is_nothing_to_tie():
    with pytest.warns(UserWarning, match="no tied modules were found"):
        model = get_peft_model(
            tiny_llama(), GraloraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
        )
    assert type(model.base_model.model.lm_head) is torch.nn.Linear
