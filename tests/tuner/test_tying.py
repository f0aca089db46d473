import copy

import oracle
import pytest
import torch
from conftest import assert_same_bits, tiny_llama, weights_of
from contract import assert_near, copy_by_pickle, factors_of
from peft import (
    PeftModel,
    get_layer_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from processes import run_two_processes
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.layer import gralora_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:This adapter uses `ensure_weight_tying`", "ignore:This adapter uses `layer_k"),
    pytest.mark.usefixtures("one_thread"),
]
TOKENS = torch.arange(3, 23)[None]
VOCABULARIES = pytest.mark.parametrize("vocabulary", [64, 67])  # in both, k fits the width alone


def base_model(vocabulary=67, **changes):
    return tiny_llama(vocab_size=vocabulary, tie_word_embeddings=True, **changes)


def config(**changes):
    settings = {"r": 4, "hybrid_r": 2, "target_modules": ["embed_tokens", "q_proj"], "init_weights": False, "alpha": 1}
    return GraloraConfig(**(settings | {"ensure_weight_tying": True} | changes))


def tied_model(vocabulary=67, dtype=torch.float32, **changes):
    return get_peft_model(base_model(vocabulary).to(dtype), config(**changes)).eval()


def ends(model):
    """Return the layers of the input and the output embedding."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def dense(layer, *factors):
    """Return the update of the embedding's weight, as it is stored."""
    return oracle.dense(*factors, layer.scaling["default"]).T[: layer.in_features]


@VOCABULARIES
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], "lm_head"], ids=str)
def test_output_and_gradients_are_those_of_one_dense_weight(vocabulary, targets):
    model = get_peft_model(base_model(vocabulary).double(), config(target_modules=targets))
    plain, (embedding, head) = base_model(vocabulary).double(), ends(model)
    factors = [factor.detach().double().requires_grad_() for factor in factors_of(embedding)]
    weight = plain.lm_head.weight.detach() + dense(embedding, *factors)
    expected = functional_call(plain, {"model.embed_tokens.weight": weight}, (TOKENS,), tie_weights=True).logits
    logits = model(TOKENS).logits
    assert_near(logits, expected, torch.float64)
    seed = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view(logits.shape)
    for found, wanted in zip(
        torch.autograd.grad(logits, [p for p in model.parameters() if p.requires_grad], seed),
        torch.autograd.grad(expected, factors, seed),
        strict=True,
    ):
        assert_near(found, wanted, torch.float64)
    assert_near(head.get_delta_weight("default"), dense(embedding, *factors).detach(), torch.float64)


def test_there_is_one_set_of_parameters():
    model = tied_model(target_modules=["embed_tokens", "lm_head"])
    trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    assert len(trained) == 4
    assert all("embed_tokens.gralora_" in name for name in trained)
    assert not any("lm_head.gralora_" in name for name in model.state_dict())
    assert {status.name for status in get_layer_status(model)} == {"model.model.embed_tokens", "model.lm_head"}


def test_training_in_bfloat16_does_not_move_the_two_apart():
    """LoRA's two copies differ after one step."""
    model = tied_model(dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    embedding, head = ends(model)
    assert factors_of(embedding)[0].dtype == torch.float32
    assert torch.equal(head.gralora_A["default"], embedding.gralora_B["default"].mT)
    assert_near(head.get_delta_weight("default"), embedding.get_delta_weight("default"), torch.float32)


def test_dropout_is_that_of_the_output_layer():
    model = tied_model(gralora_dropout=0.5)
    embedding, head = ends(model)
    x = torch.randn(3, 32)
    head.train()
    torch.manual_seed(1)
    found = head(x) - head.base_layer(x)
    torch.manual_seed(1)
    assert_near(found, functional.dropout(x, 0.5) @ embedding.get_delta_weight("default").T, torch.float32)


# Merging --------------------------------------------------------------------------------------------------------------


@VOCABULARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_gives_both_one_weight_and_an_unmerge_the_same_bits(vocabulary, dtype):
    model = tied_model(vocabulary, dtype)
    before, expected, (embedding, head) = weights_of(model), model(TOKENS).logits, ends(model)
    exact = embedding.base_layer.weight.double() + embedding.get_delta_weight("default")
    for _ in range(2):
        model.merge_adapter()
        assert embedding.base_layer.weight is head.base_layer.weight
        assert_near(embedding.base_layer.weight, exact, dtype)
        assert_near(model(TOKENS).logits, expected, dtype)
        model.unmerge_adapter()
        assert embedding.base_layer.weight is head.base_layer.weight
        assert_same_bits(before, weights_of(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("through", [copy.deepcopy, copy_by_pickle])
def test_copies_are_whole_and_independent(through, merged):
    model = tied_model()
    before, plain = weights_of(model), model(TOKENS).logits
    if merged:
        model.merge_adapter()
    expected = model(TOKENS).logits
    twin = through(model)
    with torch.no_grad():
        ends(model)[0].gralora_A["default"].zero_()
    assert torch.equal(twin(TOKENS).logits, expected)
    if merged:
        twin.unmerge_adapter()
        assert_same_bits(before, weights_of(twin))
    assert torch.equal(twin(TOKENS).logits, plain)
    with torch.no_grad():
        ends(twin)[0].gralora_A["default"].zero_()
    assert not ends(twin)[1].gralora_B["default"].any()  # still tied, and to the twin's


def test_a_conversion_while_merged_keeps_the_way_back():
    model = tied_model()
    before = {name: weight.double() for name, weight in weights_of(model).items()}
    model.merge_adapter()
    model.double()
    assert ends(model)[0].base_layer.weight is ends(model)[1].base_layer.weight
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_model_stays_tied_and_saves(keep_base, tmp_path):
    model = tied_model()
    expected = model(TOKENS).logits
    if not keep_base:
        model.merge_adapter(keep_base=False)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, expected, torch.float32)


def test_an_unload_gives_the_tied_base_back():
    model, before = tied_model(), base_model().state_dict()
    model.merge_adapter()
    plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert_same_bits(before, plain.state_dict())


def test_a_merge_of_one_layer_alone_is_right():
    model = tied_model()
    expected, (embedding, head) = model(TOKENS).logits, ends(model)
    head.merge()
    assert embedding.base_layer.weight is not head.base_layer.weight
    assert_near(model(TOKENS).logits, expected, torch.float32)
    head.unmerge()
    assert torch.equal(model(TOKENS).logits, expected)


def test_layers_whose_scales_differ_are_merged_apart():
    model = tied_model()
    before, (embedding, head) = weights_of(model), ends(model)
    head.set_scale("default", 3.0)
    expected = model(TOKENS).logits
    model.merge_adapter()
    assert embedding.base_layer.weight is not head.base_layer.weight
    assert_near(model(TOKENS).logits, expected, torch.float32)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


def test_a_safe_merge_refuses_what_is_not_finite_in_both():
    model = tied_model()
    before = weights_of(model)
    with torch.no_grad():
        ends(model)[0].gralora_B["default"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(before, weights_of(model))


# Several adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("second_is_tied", [True, False])
def test_several_adapters_add_up_and_merge(second_is_tied):
    model = tied_model(64)
    second = config(r=8, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=second_is_tied)
    model.add_adapter("second", second)
    before, (embedding, head) = weights_of(model), ends(model)
    model.base_model.set_adapter(["default", "second"])
    expected, x = model(TOKENS).logits, torch.randn(3, 32)
    deltas = [sum(layer.get_delta_weight(name) for name in ("default", "second")) for layer in (embedding, head)]
    assert_near(head(x), x @ (head.base_layer.weight + deltas[1]).T, torch.float32)
    assert torch.allclose(*deltas, atol=1e-6) == second_is_tied
    model.merge_adapter()
    assert (embedding.base_layer.weight is head.base_layer.weight) == second_is_tied
    assert_near(model(TOKENS).logits, expected, torch.float32)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    assert embedding.base_layer.weight is head.base_layer.weight
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert (embedding.base_layer.weight is head.base_layer.weight) == second_is_tied
    assert_near(model(TOKENS).logits, expected, torch.float32)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


def test_deleting_an_adapter_leaves_nothing_of_it():
    model = tied_model()
    model.add_adapter("second", config())
    model.set_adapter("second")
    model.delete_adapter("default")
    for layer in ends(model):
        assert all(set(getattr(layer, a)) == {"second"} for a in ("gralora_A", "gralora_B", *layer.other_param_names))
    model.base_model.delete_adapter("second")
    assert not any("gralora_" in name for name in model.state_dict())


def test_an_adapter_of_the_same_name_is_replaced_in_both():
    model = tied_model()
    model.base_model.delete_adapter("default")
    model.add_adapter("default", config(r=8))
    embedding, head = ends(model)
    assert torch.equal(head.gralora_A["default"], embedding.gralora_B["default"].mT)
    assert head.r == {"default": 8}


def test_what_is_assigned_to_the_output_layer_s_factor_reaches_the_embedding_s():
    embedding, head = ends(tied_model())
    value = torch.randn_like(head.gralora_A["default"])
    head.gralora_A["default"] = value
    assert torch.equal(embedding.gralora_B["default"], value.mT)
    assert embedding.gralora_B["default"].requires_grad


# Files ----------------------------------------------------------------------------------------------------------------


@VOCABULARIES
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], "lm_head|.*q_proj"], ids=str)
def test_saving_and_loading_is_bit_for_bit(vocabulary, low_cpu_mem_usage, targets, tmp_path):
    model = tied_model(vocabulary, target_modules=targets)
    model.save_pretrained(tmp_path)
    assert not any(
        "lm_head" in name or "base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    loaded = PeftModel.from_pretrained(base_model(vocabulary), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    again = base_model(vocabulary)
    again.load_adapter(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    keys = get_peft_model_state_dict(model)
    injected = inject_adapter_in_model(
        copy.deepcopy(model.peft_config["default"]),
        base_model(vocabulary),
        state_dict={key.removeprefix("base_model.model."): tensor for key, tensor in keys.items()},
    )
    set_peft_model_state_dict(injected, keys)
    assert torch.equal(injected(TOKENS).logits, model(TOKENS).logits)
    kinds = loaded.peft_config["default"].layer_kinds
    assert kinds["lm_head"] == {"kind": "tied", "to": "model.embed_tokens"}


# What is tied, and what is not ----------------------------------------------------------------------------------------


def test_without_the_flag_one_warning_says_that_they_are_adapted_apart():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True") as caught:
        model = tied_model(target_modules=["embed_tokens"], ensure_weight_tying=False)
    assert sum("ensure_weight_tying" in str(warning.message) for warning in caught) == 1
    assert set(gralora_layers(model.base_model.model)) == {"model.embed_tokens"}


@pytest.mark.parametrize(
    ("base", "targets"),
    [(tiny_llama, ["embed_tokens"]), (base_model, ["q_proj"]), (base_model, "all-linear")],
    ids=["untied", "other targets", "all-linear"],
)
def test_where_nothing_is_tied_one_warning_says_so(base, targets):
    with pytest.warns(UserWarning, match="`ensure_weight_tying` finds nothing to tie") as caught:
        model = get_peft_model(base(), config(target_modules=targets))
    assert sum("ensure_weight_tying" in str(warning.message) for warning in caught) == 1
    assert "lm_head" not in gralora_layers(model.base_model.model)


def test_an_excluded_module_is_not_tied():
    base = base_model()
    before = dict(base.named_modules())
    settings = config(exclude_modules=["lm_head"])
    with pytest.raises(ValueError, match="'lm_head' is among them, and `exclude_modules` leaves it out"):
        get_peft_model(base, settings)
    assert dict(base.named_modules()) == before


def test_a_flag_that_is_no_bool_is_refused():
    with pytest.raises(ValueError, match="`ensure_weight_tying` must be True or False; got ensure_weight_tying='yes'"):
        config(ensure_weight_tying="yes")


def test_a_failure_leaves_the_model_as_it_was():
    base = base_model()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=r"'model.embed_tokens' cannot be adapted: `gralora_k` must divide `out_f"):
        get_peft_model(base, config(gralora_k=3, r=6, target_modules=["lm_head"]))
    assert dict(base.named_modules()) == before


def tiny_bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(vocab_size=67, scale_embedding=True, **sizes, **heads)).eval()


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=67, decoder_start_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("make", [tiny_bart, tiny_t5])
@pytest.mark.parametrize("targets", [["shared"], ["lm_head"], ["embed_tokens"]], ids=str)
def test_every_embedding_of_an_encoder_and_decoder_is_tied(make, targets):
    model = get_peft_model(make(), config(target_modules=targets)).eval()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
    plain = make()
    delta = model.get_input_embeddings().get_delta_weight("default")
    with torch.no_grad():
        plain.get_input_embeddings().weight += delta
    expected, found = plain(**inputs).logits, model(**inputs).logits
    assert_near(found, expected, torch.float32)
    model.merge_adapter()
    assert len({id(layer.base_layer.weight) for layer in gralora_layers(model).values()}) == 1
    assert_near(model(**inputs).logits, expected, torch.float32)
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, found)


def test_modules_that_are_trained_whole_are_tied():
    model = get_peft_model(base_model(), config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    embedding, head = ends(model)
    assert embedding.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    assert embedding.modules_to_save["default"].weight.requires_grad


FSDP1 = """
import warnings
import gralora
from conftest import tiny_llama
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

warnings.filterwarnings("ignore", message="This adapter uses")
TOKENS = torch.arange(3, 13)[None]
config = gralora.GraloraConfig(
    r=8, gralora_k=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True, init_weights=False, alpha=1
)
base = lambda: tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
torch.manual_seed(0)
one = get_peft_model(base(), config)
model = copy.deepcopy(one)
policy = fsdp_auto_wrap_policy(model)
forward = FSDP(model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu"))
losses, expected = train(forward.train(), TOKENS), train(one.train(), TOKENS)
torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-4, rtol=0)
model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
dist.barrier()
again = PeftModel.from_pretrained(base(), f"{folder}/adapter").eval()
torch.testing.assert_close(again(TOKENS).logits, one.eval()(TOKENS).logits, atol=1e-3, rtol=0)
dist.destroy_process_group()
"""


def test_trains_and_saves_under_fsdp1_as_one_process_does(tmp_path):
    """PEFT's policy makes every factor a unit of its own, which must be called to be whole."""
    run_two_processes(FSDP1, tmp_path)
