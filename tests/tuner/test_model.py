import copy
import importlib
import re
import warnings

import pytest
import torch
from conftest import MLP, mlp_config, native_peft, randomise, tiny_gpt2, tiny_llama, tiny_opt
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from gralora import GraloraConfig, GraloraLayer, get_peft_model, rescale_adapter_scale

NativeConfig = importlib.import_module("peft.tuners.gralora.config").GraloraConfig


def adapted(model):
    return [name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, GraloraLayer)]


def layers(model):
    return [m for m in model.modules() if isinstance(m, GraloraLayer)]


def tree(model):
    return {name: id(module) for name, module in model.named_modules()}


def config(**changes):
    return GraloraConfig(**({"r": 8, "gralora_k": 2, "target_modules": ["q_proj", "v_proj"]} | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, r"model\.layers\.[01]\.self_attn\.[qv]_proj"),
        ({"target_modules": r".*layers\.1\..*(gate|up)_proj"}, r"model\.layers\.1\.mlp\.(gate|up)_proj"),
        ({"target_modules": None}, r"model\.layers\.[01]\.self_attn\.[qv]_proj"),
        ({"target_modules": "all-linear"}, r"model\.layers\.[01]\.(self_attn|mlp)\.\w+_proj"),
        (
            {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
            r".*(self_attn\.\w+|gate_proj|down_proj)",
        ),
        ({"layers_to_transform": [1]}, r"model\.layers\.1\.self_attn\.[qv]_proj"),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, r"model\.layers\.0\.self_attn\.[qv]_proj"),
        ({"exclude_modules": r".*layers\.0\..*"}, r"model\.layers\.1\.self_attn\.[qv]_proj"),
    ],
)
def test_targets(changes, expected):
    model = tiny_llama()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    wanted = [name for name in linears if re.fullmatch(expected, name)]
    assert adapted(get_peft_model(model, config(**changes))) == wanted


ALL_SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [(["q_proj"], {"q_proj"}), ("all-linear", ALL_SEVEN), (None, {"q_proj", "v_proj"}), (".*q_proj", ".*q_proj")],
)
def test_the_callers_config_is_kept_and_its_targets_resolved(asked, resolved):
    mine = config(target_modules=asked)
    expected = vars(mine) | {"target_modules": resolved}
    model = get_peft_model(tiny_llama(), mine)
    assert model.peft_config["default"] is mine
    assert vars(mine) == expected
    model.add_adapter("ref", mine)
    assert model.peft_config["ref"] is mine
    assert vars(mine) == expected
    assert all(layer.r == {"default": 8, "ref": 8} for layer in layers(model))


def test_transformers_keeps_the_callers_config_too():
    mine, model = config(target_modules="all-linear"), tiny_llama()
    model.add_adapter(mine, "mine")
    assert model.peft_config["mine"] is mine
    assert mine.target_modules == ALL_SEVEN


@pytest.mark.parametrize("asked", ["all-linear", None])
def test_a_failed_injection_leaves_the_callers_config(asked, monkeypatch):
    mine = config(target_modules=asked)
    expected = dict(vars(mine))

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(GraloraLayer, "add_adapter", fail)
    with pytest.raises(MemoryError):
        get_peft_model(tiny_llama(), mine)
    assert vars(mine) == expected


def test_a_config_that_was_broken_after_its_creation_is_refused():
    mine = config()
    mine.r = 7
    assert_refused(tiny_llama(), mine, ValueError, "`gralora_k` must divide `r`; got gralora_k=2 with r=7")


def test_a_native_config_made_before_the_import_is_converted():
    model = get_peft_model(tiny_llama(), NativeConfig(r=8, target_modules=["q_proj"]))
    assert type(model.peft_config["default"]) is GraloraConfig
    assert len(layers(model)) == 2


def test_patterns():
    model = get_peft_model(
        tiny_llama(),
        config(
            rank_pattern={"q_proj": 16}, k_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\.self_attn\.v_proj": 1}
        ),
    )
    q, v = (getattr(model.base_model.model.model.layers[1].self_attn, name) for name in ("q_proj", "v_proj"))
    assert q.gralora_A["default"].shape == (4, 8, 16)
    assert v.gralora_A["default"].shape == (2, 16, 8)
    assert (q.scaling["default"], v.scaling["default"]) == (64 / 16, 1 / 8)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "k_pattern"])
def test_a_key_of_a_pattern_that_matches_nothing_is_named(field):
    with pytest.warns(UserWarning, match=f"`{field}` has keys that match no target: 'nothing'"):
        get_peft_model(tiny_llama(), config(**{field: {"nothing": 16}}))


def test_an_exclusion_of_nothing_is_named():
    with pytest.warns(UserWarning, match=r"`exclude_modules=\{'nothing'\}` excludes nothing"):
        get_peft_model(tiny_llama(), config(exclude_modules=["nothing"]))


def test_rank_and_parameter_count_are_those_of_lora():
    ours = get_peft_model(tiny_llama(), config(r=8, hybrid_r=4, gralora_k=4))
    expected = sum((8 + 4) * (layer.in_features + layer.out_features) for layer in layers(ours))
    assert ours.get_nb_trainable_parameters()[0] == expected


# Refusals ------------------------------------------------------------------------------------------------------------


def assert_refused(model, cfg, error, message):
    before, keys = tree(model), model.state_dict().keys()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        get_peft_model(model, cfg)
    assert tree(model) == before
    assert model.state_dict().keys() == keys
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert not hasattr(model, "peft_config")


def test_a_width_that_k_does_not_divide_is_refused_with_what_fits():
    assert_refused(
        tiny_llama(intermediate_size=50),
        config(r=8, gralora_k=4, target_modules=["q_proj", "down_proj"]),
        ValueError,
        r"'model.layers.0.mlp.down_proj' cannot be adapted: `gralora_k` must divide `in_features`; got gralora_k=4 "
        r"with in_features=50.*: 1, 2\..*`exclude_modules`",
    )


def test_a_failure_at_the_tenth_layer_leaves_the_tree_as_it_was():
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(12)])
    model[9] = nn.Linear(8, 9)
    assert_refused(model, config(target_modules=[str(i) for i in range(12)]), ValueError, r"'9' cannot be adapted")


def test_a_failure_after_the_checks_is_undone_too(monkeypatch):
    model = tiny_llama()
    made = GraloraLayer.add_adapter

    def fail_at_the_third(self, *args, **kwargs):
        fail_at_the_third.calls += 1
        if fail_at_the_third.calls == 3:
            raise MemoryError("no room")
        made(self, *args, **kwargs)

    fail_at_the_third.calls = 0
    monkeypatch.setattr(GraloraLayer, "add_adapter", fail_at_the_third)
    assert_refused(model, config(), MemoryError, "no room")


def test_a_refused_second_adapter_leaves_the_first():
    model = get_peft_model(tiny_llama(), config())
    before, scaling = tree(model), layers(model)[0].scaling
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    with pytest.raises(ValueError, match="cannot be adapted"):
        model.add_adapter("second", config(r=20, gralora_k=5))
    assert tree(model) == before
    assert model.peft_config.keys() == scaling.keys() == {"default"}
    assert model.active_adapter == "default"
    assert torch.equal(model(tokens).logits, expected)
    assert all(p.requires_grad for n, p in model.named_parameters() if "gralora_" in n)


def test_modules_of_other_kinds_are_refused():
    assert_refused(tiny_llama(), config(target_modules=["norm"]), TypeError, "got LlamaRMSNorm")
    assert_refused(tiny_llama(), config(target_modules=["mlp"]), TypeError, "got LlamaMLP")


def test_multihead_attention_is_refused_by_name_and_left_out_of_all_linear():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert_refused(
        model, config(target_modules=["out_proj"]), TypeError, "MultiheadAttention reads this layer's weight"
    )
    with pytest.warns(UserWarning, match="leaves out 'self_attn.out_proj'"):
        adapted_model = get_peft_model(model, config(target_modules="all-linear"))
    assert adapted(adapted_model) == ["linear1", "linear2"]


def test_mamba_layers_that_are_read_and_not_called_are_refused():
    model = MambaForCausalLM(
        MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4, intermediate_size=32)
    )
    assert_refused(model, config(target_modules=["out_proj"]), ValueError, "'mamba' read the weight of 'out_proj'")
    assert adapted(get_peft_model(copy.deepcopy(model), config(target_modules=["in_proj"]))) == [
        "backbone.layers.0.mixer.in_proj"
    ]
    with pytest.warns(UserWarning, match=r"leaves out .*'backbone.layers.0.mixer.out_proj'"):
        assert adapted(get_peft_model(model, config(target_modules="all-linear"))) == [
            "backbone.layers.0.mixer.in_proj"
        ]


def test_unmatched_targets_are_named_with_the_nearest():
    with pytest.warns(UserWarning, match=r"match no module: 'q_prj' \(nearest: 'q_proj'"):
        get_peft_model(tiny_llama(), config(target_modules=["q_prj", "v_proj"]))
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(tiny_llama(), config(target_modules=["nothing"]))


def test_all_linear_leaves_out_widths_that_k_does_not_divide_and_warns():
    model = tiny_llama()
    model.model.layers[0].mlp.gate = nn.Linear(32, 1)
    with pytest.warns(
        UserWarning, match=r"leaves out 'model.layers.0.mlp.gate': `gralora_k=2` does not divide"
    ) as seen:
        names = adapted(get_peft_model(model, config(target_modules="all-linear")))
    assert len([w for w in seen if w.category is UserWarning]) == 1
    assert len(names) == 14


def test_all_linear_without_a_layer_that_fits_says_why():
    assert_refused(
        nn.Sequential(nn.Linear(9, 9)),
        config(target_modules="all-linear"),
        ValueError,
        r"must find a layer that can be adapted; none of 1 can. '0': `gralora_k` must divide.*in_features=9.*: 1",
    )


class Ambiguous(nn.Module):
    """Short names at the top that are the ends of other modules' names."""

    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 8)
        self.enc = nn.ModuleDict({"proj": nn.Linear(8, 9), "up": nn.Linear(8, 8)})

    def forward(self, x):
        x = self.attn(x, x, x)[0] + self.out_proj(x) + self.proj(x)
        return x + self.enc["up"](x) + self.enc["proj"](x)[..., :8]


@pytest.mark.parametrize("excluded", [None, ["enc.up"]])
def test_all_linear_adapts_and_stores_what_it_chose_and_nothing_else(excluded, tmp_path):
    wanted = ["out_proj", "proj"] if excluded else ["out_proj", "proj", "enc.up"]
    pristine, x = Ambiguous(), torch.randn(2, 3, 8)
    mine = config(target_modules="all-linear", exclude_modules=excluded)
    with pytest.warns(
        UserWarning,
        match=r"leaves out 'attn.out_proj': .* reads the weight .*; 'enc.proj': .* does not divide the widths",
    ):
        model = randomise(get_peft_model(copy.deepcopy(pristine), mine)).eval()
    assert adapted(model) == wanted
    expected = model(x)
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)
    assert adapted(loaded) == wanted
    assert torch.equal(loaded(x), expected)
    with native_peft(), warnings.catch_warnings(action="ignore"):
        native = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)
        assert native.targeted_module_names == wanted
        torch.testing.assert_close(native(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_all_linear_by_the_keys_of_a_state_dict_stores_those():
    keys = get_peft_model_state_dict(get_peft_model(tiny_llama(), config(target_modules=["k_proj"])))
    named = {key.removeprefix("base_model.model."): value for key, value in keys.items()}
    mine = config(target_modules="all-linear")
    model = inject_adapter_in_model(mine, tiny_llama(), state_dict=named)
    assert mine.target_modules == {"k_proj"}
    assert len(layers(model)) == 2


def test_short_names_load_into_the_model_without_its_head(tmp_path):
    model = randomise(get_peft_model(tiny_llama(), config(target_modules="all-linear")))
    model.save_pretrained(tmp_path)
    backbone = tiny_llama().model
    backbone.load_adapter(str(tmp_path))
    tokens = torch.arange(8)[None]
    assert torch.equal(backbone(tokens)[0], model.base_model.model.model(tokens)[0])


# One module under several names --------------------------------------------------------------------------------------


class Shared(nn.Module):
    """`a` and `b` are one module, and so are the three of `stack`."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(8, 8)
        self.stack = nn.ModuleList([nn.Linear(8, 8)] * 3)

    def modules_by_use(self):
        return [self.a, self.b, *self.stack]

    def forward(self, x):
        for module in self.modules_by_use():
            x = x + torch.tanh(module(x))
        return x


def with_dense_weights(model, deltas):
    """A copy of `model` in float64 with `deltas` added, by the name of a weight."""
    dense = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            dense.get_parameter(f"{name}.weight").add_(delta.double())
    return dense


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["a"], ["a"]),
        (["b"], ["a"]),
        (["stack.2", "b"], ["a", "stack.0"]),
        (r"stack\.1", ["stack.0"]),
        ("all-linear", ["a", "stack.0"]),
    ],
)
def test_one_module_gets_one_layer_at_each_of_its_places(targets, wanted, tmp_path):
    pristine, x = Shared(), torch.randn(3, 8)
    model = randomise(get_peft_model(copy.deepcopy(pristine), config(target_modules=targets)), 0.1)
    assert adapted(model) == wanted
    places = model.base_model.model.modules_by_use()
    for first, second in ((0, 1), (2, 3), (2, 4)):
        assert places[first] is places[second]
    deltas = {name: model.base_model.model.get_submodule(name).get_delta_weight("default") for name in wanted}
    expected = model(x)
    torch.testing.assert_close(expected, with_dense_weights(pristine, deltas)(x.double()).float())
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)):
        assert torch.equal(other(x), expected)
        assert tree_of_uses(other.base_model.model) == tree_of_uses(model.base_model.model)
        plain = other.unload()
        assert torch.equal(plain(x), pristine(x))
        assert tree_of_uses(plain) == tree_of_uses(pristine)
        assert all(type(module) is nn.Linear for module in plain.modules_by_use())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert tree_of_uses(merged) == tree_of_uses(pristine)
    assert all(type(module) is nn.Linear for module in merged.modules_by_use())


def tree_of_uses(model):
    """Return which uses share a module."""
    first = [id(module) for module in model.modules_by_use()]
    return [first.index(module) for module in first]


def test_a_failed_injection_puts_a_shared_module_back_at_each_of_its_places(monkeypatch):
    model, made = Shared(), []

    def fail_at_the_second(self, *args, **kwargs):
        made.append(self)
        if len(made) == 2:
            raise MemoryError("no room")

    monkeypatch.setattr(GraloraLayer, "add_adapter", fail_at_the_second)
    before = list(map(id, model.modules_by_use()))
    assert_refused(model, config(target_modules="all-linear"), MemoryError, "no room")
    assert list(map(id, model.modules_by_use())) == before


def test_the_names_of_a_shared_module_must_agree():
    assert_refused(
        Shared(),
        config(target_modules=["a"], alpha_pattern={"b": 3}),
        ValueError,
        r"'a' cannot be adapted: a module has one adapter.*its names 'a', 'b'",
    )
    model = get_peft_model(Shared(), config(target_modules=["a"], alpha_pattern={"a|b": 3}))
    assert model.base_model.model.b.scaling == {"default": 3 / 8}
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_peft_model(Shared(), config(target_modules=["a"], exclude_modules=["b"]))


def test_a_shared_module_is_refused_where_one_of_its_callers_reads_its_weight():
    model = nn.ModuleDict({"lin": nn.Linear(8, 8), "attn": nn.MultiheadAttention(8, 2)})
    model["lin"] = model["attn"].out_proj
    assert_refused(model, config(target_modules=["lin"]), TypeError, "MultiheadAttention reads this layer's weight")


def test_features_of_lora_that_are_missing_are_refused():
    model = get_peft_model(tiny_llama(), config())
    tokens = torch.arange(8)[None]
    with pytest.raises(NotImplementedError, match=r"`add_weighted_adapter`.*yet"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(NotImplementedError, match=r"`adapter_names`.*yet"):
        model(tokens, adapter_names=["default"])
    with pytest.raises(NotImplementedError, match=r"`adapter_names`.*yet"):
        model.generate(input_ids=tokens, adapter_names=["default"], max_new_tokens=1)


# Layouts, biases, heads ----------------------------------------------------------------------------------------------


def test_linear_and_conv1d_in_one_model_get_their_own_layouts():
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc = nn.Linear(64, 256)
    for flag in (False, True):
        mine = GraloraConfig(r=8, target_modules=["c_fc"], fan_in_fan_out=flag, init_weights=False)
        peft_model = get_peft_model(copy.deepcopy(model), mine)
        conv, linear = (block.mlp.c_fc for block in peft_model.base_model.model.transformer.h)
        assert conv.get_delta_weight("default").shape == (64, 256)
        assert linear.get_delta_weight("default").shape == (256, 64)
        tokens = torch.arange(8)[None]
        expected = peft_model(tokens).logits
        torch.testing.assert_close(peft_model.merge_and_unload()(tokens).logits, expected, atol=2e-5, rtol=1e-5)
        assert mine.fan_in_fan_out is flag


@pytest.mark.parametrize(("bias", "expected"), [("none", 0), ("gralora_only", 4), ("all", None)])
def test_biases_train_as_asked(bias, expected):
    model = get_peft_model(tiny_opt(), config(bias=bias))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    every = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert len(trained) == (len(every) if expected is None else expected)


@pytest.mark.parametrize("bias", ["gralora_only", "all"])
def test_trained_biases_are_saved_and_loaded(bias, tmp_path):
    model = get_peft_model(tiny_opt(), config(bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path)
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_head_that_is_a_container_survives_merging(tmp_path):
    torch.manual_seed(0)
    settings = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    base = RobertaForSequenceClassification(settings).eval()
    pristine = copy.deepcopy(base)
    mine = GraloraConfig(r=8, target_modules=["query"], task_type="SEQ_CLS")
    model = randomise(get_peft_model(base, mine)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].dense.weight.add_(0.5)
    tokens = torch.arange(3, 12)[None]
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(pristine, tmp_path)(tokens).logits, expected)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(tokens).logits, expected)
    assert type(plain.classifier).__name__ == "RobertaClassificationHead"


def bert(head):
    torch.manual_seed(0)
    if "DistilBert" in head.__name__:
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        return head(DistilBertConfig(vocab_size=64, **sizes)).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return head(BertConfig(vocab_size=64, **sizes)).eval()


HEADS = {
    BertForTokenClassification: "TOKEN_CLS",
    BertForQuestionAnswering: "QUESTION_ANS",
    BertForSequenceClassification: "SEQ_CLS",
    DistilBertForSequenceClassification: "SEQ_CLS",  # PEFT trains its `pre_classifier` too
}


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(GraloraConfig, ["query", "q_lin"]), (GraloraConfig, "all-linear"), (NativeConfig, ["query", "q_lin"])],
)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore:`target_modules` names that match no module")
def test_heads_train_save_load_and_merge_as_loras(head, kind, targets, tmp_path):
    def trained(model):
        return {name for name, p in model.named_parameters() if p.requires_grad and "ora_" not in name}

    lora = get_peft_model(bert(head), LoraConfig(target_modules=["query", "q_lin"], task_type=HEADS[head]))
    mine = kind(r=8, target_modules=targets, task_type=HEADS[head])
    model = get_peft_model(bert(head), mine)
    assert trained(model) == trained(lora) != set()
    assert model.peft_config["default"].modules_to_save == mine.modules_to_save
    tokens = torch.arange(3, 12)[None]
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(tokens)[0].square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == {name for name in wanted if "gralora_A" not in name}  # which has no gradient while B is zero
    expected = model(tokens)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(bert(head), tmp_path)(tokens)[0], expected)
    torch.testing.assert_close(model.merge_and_unload()(tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_head_that_is_trained_whole_is_no_target():
    mine = config(target_modules=["query", "classifier"], task_type="TOKEN_CLS")
    assert_refused(
        bert(BertForTokenClassification),
        mine,
        ValueError,
        "'classifier' cannot be adapted: PEFT trains this module whole",
    )
    mine = config(target_modules=["classifier"], task_type="SEQ_CLS")
    model = inject_adapter_in_model(mine, bert(BertForSequenceClassification))  # PEFT trains no head here
    assert adapted(model) == ["classifier"]


def test_modules_to_save_of_a_plain_head(tmp_path):
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    base = LlamaForSequenceClassification(settings).eval()
    pristine = copy.deepcopy(base)
    model = randomise(get_peft_model(base, config(task_type="SEQ_CLS"))).eval()
    tokens = torch.arange(3, 12)[None]
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pristine, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(tokens).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected)


def test_trainable_tokens_train_save_load_and_merge(tmp_path):
    model = randomise(get_peft_model(tiny_llama(), config(trainable_token_indices=[3, 5])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                assert parameter.requires_grad
                parameter.add_(1.0)
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    with pytest.warns(UserWarning, match=r"`trainable_token_indices`"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(tokens).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.filterwarnings("ignore:This adapter uses `trainable_token_indices`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:1 adapted layers cannot be merged:UserWarning")
def test_trainable_tokens_of_a_tied_model_load(low_cpu_mem_usage, tmp_path):
    mine = config(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5])
    model = randomise(get_peft_model(tiny_llama(tie_word_embeddings=True), mine))
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].add_(1.0)
    model.save_pretrained(tmp_path)
    base = tiny_llama(tie_word_embeddings=True)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


# Adapters, several of them -------------------------------------------------------------------------------------------


def test_status_and_disabling():
    model = randomise(get_peft_model(tiny_llama(), config()))
    tokens = torch.arange(8)[None]
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert not torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    status = model.get_model_status()
    assert (status.adapter_model_type, status.num_adapter_layers, status.enabled) == ("GraloraModel", 4, True)
    assert status.requires_grad == {"default": True}
    assert {s.module_type for s in model.get_layer_status()} == {"gralora.Linear"}


def test_frozen_means_frozen_over_half_precision(tmp_path):
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for n, p in loaded.named_parameters() if "gralora" in n} == {torch.float32}
    trained = get_peft_model(tiny_llama().bfloat16(), config(hybrid_r=2))
    trained.add_adapter("second", config(hybrid_r=2))
    for name, parameter in trained.named_parameters():
        assert parameter.requires_grad == (".default." in name)


def test_rescale_adapter_scale():
    model = get_peft_model(tiny_llama(), config())
    start = layers(model)[0].scaling["default"]
    with rescale_adapter_scale(model, 0.5):
        assert all(layer.scaling["default"] == 0.5 * start for layer in layers(model))
    assert all(layer.scaling["default"] == start for layer in layers(model))
    with pytest.raises(ValueError, match="must have GraLoRA layers"), rescale_adapter_scale(MLP(), 0.5):
        pass
    with pytest.raises(ValueError, match="multiplier=nan"), rescale_adapter_scale(model, float("nan")):
        pass


def test_inject_adapter_in_model_twice():
    model = inject_adapter_in_model(config(), tiny_llama(), "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(config(r=4), model, "two")
    assert layers(model)[0].r == {"one": 8, "two": 4}


class WithoutEmbeddings(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.lin = nn.Linear(8, 8)
        self.post_init()

    def forward(self, x):
        return self.lin(x)


def test_a_transformers_model_without_embeddings_is_saved(tmp_path):
    base = WithoutEmbeddings()
    model = get_peft_model(copy.deepcopy(base), GraloraConfig(r=4, target_modules=["lin"], init_weights=False))
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


class Doubled(nn.Module):
    def forward(self, factor):
        return 2 * factor


def test_saving_is_refused_where_a_factor_would_be_missing(tmp_path):
    model = get_peft_model(MLP(), mlp_config())
    holder = model.base_model.model.up.gralora_A._modules["default"]
    parametrize.register_parametrization(holder, "weight", Doubled())
    with pytest.raises(RuntimeError, match=r"the state dict has no 'base_model\.model\.up\.gralora_A\.default'"):
        model.save_pretrained(tmp_path)
    parametrize.remove_parametrizations(holder, "weight")
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    base = MLP()
    base.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in model.base_model.model.state_dict().items() if "gralora" not in n}
    )
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))
