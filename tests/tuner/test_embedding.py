"""Embeddings, compared with dense weights: PEFT's LoRA crashes or is wrong for some of the options."""

import copy

import peft
import pytest
import torch
from conftest import assert_same_bits, small_config, tiny_gpt2, tiny_llama, weights_of
from contract import LayerContract, assert_near, layer_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.embedding import Embedding

VOCABULARY, WIDTH = 13, 12  # no number of blocks but 1 divides 13


class EmbeddingContract(LayerContract):
    """Ids in, rows of the weight out; the matrix of the update is that of the transposed weight."""

    fresh_is_exact = True

    def make_base(self, dtype):
        return nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)

    def make_input(self, dtype):
        return torch.randint(0, VOCABULARY, (2, 9))

    def stored(self, base, delta):
        return delta[:, : base.num_embeddings].T

    def output(self, base, x, weight):
        return functional.embedding(x, weight, base.padding_idx, None, 2.0, base.scale_grad_by_freq)

    def test_one_dropout_draw_feeds_both_parts(self):
        """There is no dropout, as in LoRA."""
        layer, x = layer_of(self.adapt(gralora_dropout=0.5)).train(), self.make_input(self.exact_dtype)
        assert_near(layer(x), self.expected(layer, x, "default"), self.exact_dtype)


class TestOddVocabulary(EmbeddingContract):
    pass


class TestPadding(EmbeddingContract):
    def make_base(self, dtype):
        return nn.Embedding(24, WIDTH, padding_idx=3, dtype=dtype)

    def make_input(self, dtype):
        return torch.tensor([[3, 1, 23, 3, 7], [2, 3, 3, 11, 12]])


class TestGradientsByFrequency(EmbeddingContract):
    def make_base(self, dtype):
        return nn.Embedding(VOCABULARY, WIDTH, scale_grad_by_freq=True, dtype=dtype)

    def make_input(self, dtype):
        return torch.tensor([[3, 1, 12, 3, 7], [2, 3, 3, 11, 12]])


class TestScaled(EmbeddingContract):
    """The word embeddings of Gemma."""

    def make_base(self, dtype):
        return Gemma3TextScaledWordEmbedding(VOCABULARY, WIDTH, padding_idx=0, embed_scale=3.5).to(dtype)

    def output(self, base, x, weight):
        return super().output(base, x, weight) * base.embed_scale.double()


def adapted(base, **changes):
    return get_peft_model(nn.Sequential(copy.deepcopy(base)), small_config(**changes))


def test_a_sparse_embedding_trains():
    """Its frozen weight has no gradient, and those of the factors are dense; LoRA's backward pass fails."""
    ids, base = torch.tensor([[3, 1, 12, 3]]), nn.Embedding(VOCABULARY, WIDTH, sparse=True, dtype=torch.float64)
    gradients = []
    for sparse in (True, False):
        base.sparse = sparse
        torch.manual_seed(0)
        model = adapted(base)
        model(ids).square().sum().backward()
        gradients.append(model.base_model.model[0].gralora_A["default"].grad)
    assert gradients[0].layout is torch.strided
    assert torch.equal(*gradients)
    base.sparse = True
    lora = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(RuntimeError):
        lora(ids).square().sum().backward()


def test_the_start_is_that_of_lora():
    layer = adapted(nn.Embedding(40, 256), init_weights=True, r=64, hybrid_r=64).base_model.model[0]
    A, B, A_general, B_general = layer.factors("default")
    assert not A.any()
    assert not A_general.any()
    for factor in (B, B_general):
        assert abs(factor.std() - 1) < 0.05
        assert abs(factor.mean()) < 0.05


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.Embedding(8, 4, max_norm=1.0), r"must not have a `max_norm`; got max_norm=1\.0"),
        (OPTLearnedPositionalEmbedding(8, 4), "OPTLearnedPositionalEmbedding does something else"),
    ],
)
def test_embeddings_that_are_no_table_of_rows_are_refused(base, reason):
    model = nn.Sequential(base)
    with pytest.raises(TypeError, match=f"'0' cannot be adapted: .*{reason}"):
        get_peft_model(model, small_config())
    assert model[0] is base


def test_a_subclass_that_changes_rows_is_refused():
    class Normed(nn.Embedding):
        def forward(self, ids):
            return functional.normalize(super().forward(ids))

    with pytest.raises(TypeError, match="Normed does something else"):
        get_peft_model(nn.Sequential(Normed(8, 4)), small_config())


def test_no_ids():
    assert adapted(nn.Embedding(8, 4))(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 4)


def test_all_linear_layers_do_not_include_embeddings():
    model = get_peft_model(tiny_llama(), GraloraConfig(r=4, target_modules="all-linear"))
    assert not any(isinstance(module, Embedding) for module in model.modules())


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`", "ignore:This adapter uses `layer_kinds`"
)
class TestSaving:
    """What a file of an adapter on the embedding holds."""

    def adapted(self, model, **changes):
        settings = {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "init_weights": False}
        return get_peft_model(model, GraloraConfig(**(settings | changes)))

    def test_a_frozen_base_is_not_written(self, tmp_path):
        model, ids = self.adapted(tiny_llama()), torch.randint(0, 64, (2, 7))
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert not [key for key in keys if "gralora_" not in key]
        assert "base_model.model.model.embed_tokens.gralora_A" in keys
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)

    def test_a_resized_base_is_written(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "base")
        base = tiny_llama()
        base.resize_token_embeddings(70)
        model, ids = self.adapted(base), torch.randint(0, 70, (2, 7))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        fresh = tiny_llama()
        fresh.resize_token_embeddings(70)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)

    def test_a_trained_base_is_written(self, tmp_path):
        model = self.adapted(tiny_llama())
        model.base_model.model.model.embed_tokens.base_layer.weight.requires_grad_(True)
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert "base_model.model.model.embed_tokens.base_layer.weight" in keys


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_odd_vocabulary_of_a_model_with_tied_weights():
    model = tiny_gpt2()
    model.resize_token_embeddings(61)
    plain = copy.deepcopy(model)
    model = get_peft_model(model, GraloraConfig(r=4, target_modules=["wte"], init_weights=False)).eval()
    ids, before = torch.randint(0, 61, (2, 7)), weights_of(model)
    expected = model(ids).logits
    plain.transformer.wte = nn.Embedding.from_pretrained(
        plain.transformer.wte.weight + model.base_model.model.transformer.wte.get_delta_weight("default")
    )
    torch.testing.assert_close(plain(ids).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
