import peft
import pytest
import torch
from conftest import tiny_llama
from contract import LayerContract, assert_near, hold, layer_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.embedding import Embedding

# An adapter on an embedding is one that PEFT's own GraLoRA does not know.
pytestmark = pytest.mark.filterwarnings("ignore:This adapter uses `layer_kinds`")

VOCABULARY, PADDING = 13, 6  # no k but 1 divides it


class EmbeddingContract(LayerContract):
    """The dense update is that of one-hot vectors, transposed, without the rows beyond the vocabulary."""

    takes_ids = True

    def output(self, base, x, weight):
        return functional.embedding(x, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def stored(self, base, delta):
        return delta.T[: base.num_embeddings]

    def make_base(self, dtype):
        return nn.Embedding(VOCABULARY, 24, dtype=dtype)

    def make_input(self, dtype):
        """Ids of both ends of the vocabulary, some of them twice."""
        return torch.cat([torch.tensor([0, VOCABULARY - 1, PADDING]), torch.randint(VOCABULARY, (15,))]).view(3, 6)


class TestEmbedding(EmbeddingContract):
    pass


class TestPaddedEmbedding(EmbeddingContract):
    def make_base(self, dtype):
        return nn.Embedding(VOCABULARY, 24, padding_idx=PADDING, dtype=dtype)


class TestScaledEmbedding(EmbeddingContract):
    """Gemma's, whose scale is a tensor that follows the dtype of the weight."""

    def make_base(self, dtype):
        return ScaledByTensor(VOCABULARY, 24).to(dtype)

    def output(self, base, x, weight):
        return super().output(base, x, weight) * base.embed_scale.to(base.weight.dtype).double()


class ScaledByTensor(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(7.13), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    embed_scale = 7.13

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Normed(nn.Embedding):
    def forward(self, ids):
        return functional.normalize(super().forward(ids), dim=-1)


class WithATokenOfItsOwn(ScaledByNumber):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.special = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, ids):
        return super().forward(ids).where((ids != 9)[..., None], self.special)


class AlsoOfProbabilities(nn.Embedding):
    def forward(self, ids):
        return ids @ self.weight if ids.is_floating_point() else super().forward(ids)


@pytest.mark.parametrize("sizes", [(13, 24), (12, 24), (1, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_vocabularies_of_any_size(sizes, k):
    contract = EmbeddingContract()
    model = contract.adapt(base=nn.Embedding(*sizes, dtype=torch.float64), k=k, hybrid_r=1)
    for ids in (torch.arange(sizes[0]), torch.tensor(sizes[0] - 1), torch.arange(sizes[0], dtype=torch.int32)[None]):
        expected = contract.expected(layer_of(model), ids, "default")
        assert_near(model(ids), expected, torch.float64)
    assert model(ids[:0]).shape == (0, *expected.shape[1:])
    model.merge_adapter()
    assert_near(model(ids), expected, torch.float64)


def test_a_scale_that_is_a_number():
    contract = EmbeddingContract()
    model, ids = contract.adapt(base=ScaledByNumber(13, 24, dtype=torch.float64), hybrid_r=2), torch.arange(13)
    expected = 7.13 * contract.expected(layer_of(model), ids, "default")
    assert_near(model(ids), expected, torch.float64)
    model.merge_adapter()
    assert_near(model(ids), expected, torch.float64)


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": PADDING}], ids=str)
def test_gradients_are_those_of_the_dense_update_with_options(options):
    """LoRA's gradients of a sparse embedding raise, and only those of its A are scaled by frequency."""

    class Contract(EmbeddingContract):
        def make_base(self, dtype):
            return nn.Embedding(VOCABULARY, 24, dtype=dtype, **options)

    Contract().test_gradients_are_those_of_the_dense_update(k=2, hybrid_r=2)


@pytest.mark.parametrize("init_weights", [True, False])
def test_the_padding_row_stays_as_it_is(init_weights):
    base = nn.Embedding(VOCABULARY, 24, padding_idx=PADDING)
    model = EmbeddingContract().adapt(base=base, hybrid_r=2, init_weights=init_weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    for _ in range(3):
        model(torch.arange(VOCABULARY)).square().sum().backward()
        optimizer.step()
    delta = layer_of(model).get_delta_weight("default")
    assert not delta[PADDING].any()
    assert all(row.any() for i, row in enumerate(delta) if i != PADDING)


def test_a_fresh_adapter_has_its_zeros_in_the_rows_of_the_vocabulary():
    layer = layer_of(EmbeddingContract().adapt(base=nn.Embedding(400, 96), k=2, hybrid_r=2, init_weights=True))
    for zero, random in ((layer.gralora_A, layer.gralora_B), (layer.gralora_A_general, layer.gralora_B_general)):
        assert not zero._modules["default"].weight.any()
        assert random._modules["default"].weight.detach().std() == pytest.approx(1, abs=0.2)


def test_a_forward_and_backward_pass_makes_nothing_of_the_size_of_the_weight():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            sizes.extend((t.dtype, t.numel()) for t in tensors)
            return result

    base = nn.Embedding(5000, 64, dtype=torch.bfloat16)
    model = EmbeddingContract().adapt(base=base, hybrid_r=2)
    with Watch():
        model(torch.arange(100)).sum().backward()
    assert max(size for _, size in sizes) < base.weight.numel() / 10
    assert max(size for dtype, size in sizes if dtype == torch.bfloat16) == 100 * 64  # A itself is not cast


def refused(base, error=TypeError, **changes):
    model = hold(base)
    with pytest.raises(error, match="'layer' cannot be adapted") as caught:
        get_peft_model(model, EmbeddingContract().config(**changes))
    assert model.layer is base
    return str(caught.value)


def test_an_embedding_that_rewrites_its_weight_is_refused():
    """LoRA's forward pass then renormalises its own A in place, so that its merge is another function."""
    assert "got max_norm=1.0" in refused(nn.Embedding(13, 24, max_norm=1.0))


@pytest.mark.parametrize(
    "base",
    [
        Normed(13, 24),
        WithATokenOfItsOwn(13, 24),
        AlsoOfProbabilities(13, 24),
        BartLearnedPositionalEmbedding(13, 24),
        OPTLearnedPositionalEmbedding(13, 24),
        MarianSinusoidalPositionalEmbedding(13, 24),
        IdeficsDecoupledEmbedding(13, 2, 24),
    ],
    ids=lambda base: type(base).__name__,
)
def test_embeddings_that_do_something_else_are_refused(base):
    """LoRA's adapter on Bart's positions raises in the forward pass."""
    before = base.weight.detach().clone()
    assert f"the `forward` of {type(base).__name__} does something else" in refused(base)
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_word_embeddings_are_taken(device):
    for base in (BartScaledWordEmbedding(13, 24, None, 4.9), Gemma3TextScaledWordEmbedding(13, 24, 0, 4.9)):
        model = get_peft_model(hold(base.to(device)), EmbeddingContract().config(), low_cpu_mem_usage=device == "meta")
        assert isinstance(layer_of(model), Embedding)


def test_what_the_config_keeps_of_it():
    model = EmbeddingContract().adapt(base=nn.Embedding(13, 24))
    assert model.peft_config["default"].layer_kinds == {"layer": {"kind": "embedding", "shape": [13, 24]}}
    assert not model.supports_lora_conversion()


# In a language model.

TOKENS = torch.arange(3, 23)[None]


def language_model(targets=("embed_tokens", "q_proj"), base=None, **settings):
    config = GraloraConfig(r=4, target_modules=list(targets), init_weights=False, **settings)
    return get_peft_model(tiny_llama(vocab_size=66) if base is None else base, config).eval()


def test_all_linear_layers_do_not_include_embeddings():
    model = get_peft_model(tiny_llama(), GraloraConfig(r=4, target_modules="all-linear"))
    assert type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_gives_the_same_outputs_merged(dtype):
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=66,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=False,
        )
    ).to(dtype)
    model = language_model(base=base)
    expected = model(TOKENS).logits
    model.merge_adapter()
    assert_near(model(TOKENS).logits, expected, dtype)


def saved_names(folder):
    return {name for name in load_file(folder / "adapter_model.safetensors") if "base_layer" in name}


BASE_WEIGHT = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_the_base_weight_is_not_saved_with_the_adapter(targets, tmp_path):
    model = language_model(targets)
    model.save_pretrained(tmp_path)
    assert not saved_names(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(vocab_size=66), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_the_base_weight_is_saved_where_asked_for(tmp_path):
    language_model().save_pretrained(tmp_path, save_embedding_layers=True)
    assert saved_names(tmp_path) == {BASE_WEIGHT}


def test_the_base_weight_is_saved_where_it_was_trained(tmp_path):
    model = language_model()
    model.get_input_embeddings().base_layer.weight.requires_grad_()
    model.save_pretrained(tmp_path)
    assert saved_names(tmp_path) == {BASE_WEIGHT}


def test_the_base_weight_is_saved_where_the_vocabulary_was_resized(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = language_model(base=base)
    model.save_pretrained(tmp_path / "same")
    assert not saved_names(tmp_path / "same")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(67, mean_resizing=False)
    model = language_model(base=base)
    model.save_pretrained(tmp_path / "resized")
    assert saved_names(tmp_path / "resized") == {BASE_WEIGHT}
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(67, mean_resizing=False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "resized")
    assert torch.equal(loaded.get_input_embeddings()(TOKENS), model.get_input_embeddings()(TOKENS))


def test_a_base_config_that_cannot_be_read_is_named(tmp_path):
    model = language_model()
    model.peft_config["default"].base_model_name_or_path = "nobody/nothing"
    with pytest.warns(UserWarning, match="'nobody/nothing' cannot be read.*`save_embedding_layers=True`"):
        model.save_pretrained(tmp_path)
    assert not saved_names(tmp_path)


def test_a_state_dict_of_the_adapter_has_no_base_weight():
    """transformers' `save_pretrained` calls this without saying whether to save embeddings."""
    assert not any("base_layer" in name for name in peft.get_peft_model_state_dict(language_model()))
