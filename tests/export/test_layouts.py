"""Exports of layers that are not linear, loaded by PEFT's LoRA or compared with dense weights where it cannot."""

import copy

import oracle
import pytest
import torch
from conftest import randomise, small_config, tiny_llama
from mixtures import MODELS, moe_config, tiny
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from gralora import get_peft_model, to_lora
from gralora.export.layouts import pairs_of, projections_of
from gralora.files.checkpoint import open_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's own, when it fuses gate and up of an old file: the patterns that it adds match no module.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
# Linear layers of other ranks and scales beside the stacks; short names and patterns for parameters.
SETTINGS = {
    "hybrid_r": 2,
    "rank_pattern": {"experts.down_proj": 8},
    "alpha_pattern": {"gate_up_proj": 3.3},
}


def tuned(name, **changes):
    plain = tiny(name)
    linear = "kv_b_proj" if name == "deepseek_v3" else "q_proj"
    settings = SETTINGS | {"target_modules": [linear]} | changes
    return plain, get_peft_model(copy.deepcopy(plain), moe_config(**settings)).eval()


def load_in_peft(plain, folder):
    """Load a LoRA into a copy of `plain`, and check that each of its tensors found its place."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    return loaded


def assert_all_found(loaded, folder):
    written = load_file(folder / "adapter_model.safetensors")
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == written.keys()
    for key, tensor in written.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("name", MODELS)
def test_stacked_experts_are_those_of_pefts_lora(name, tmp_path):
    plain, model = tuned(name)
    export = to_lora(model, tmp_path / "lora")
    assert export.rank == 18
    assert export.config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert len(export.config["target_modules"]) == 1
    loaded = load_in_peft(plain, tmp_path / "lora")
    assert_all_found(loaded, tmp_path / "lora")
    # The scales that `lora_alpha` does not state were multiplied in float64.
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    merged = dict(model.merge_and_unload().named_parameters())
    for key, parameter in loaded.merge_and_unload().named_parameters():
        torch.testing.assert_close(parameter, merged[key], atol=1e-14, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_under_their_old_names_are_fused_again_by_peft(name, tmp_path):
    plain, model = tuned(name)
    export = to_lora(model, tmp_path / "lora", experts="per-expert")
    old = "block_sparse_moe.experts.3.w3" if name == "mixtral" else "mlp.experts.3.up_proj"
    assert f"base_model.model.model.layers.1.{old}.lora_B.weight" in export.tensors
    assert "target_parameters" not in export.config
    loaded = load_in_peft(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_each_expert_has_the_rows_of_its_own_projections(name, tmp_path):
    """PEFT fuses no old files for these models: the products are compared with the dense update."""
    _, model = tuned(name)
    export = to_lora(model, tmp_path / "lora", experts="per-expert")
    block = "feed_forward" if name == "llama4" else "mlp"
    factors = open_adapter(model).factors(f"model.layers.1.{block}.experts.gate_up_proj").expert(2)
    dense = oracle.dense(*factors, 3.3 / 6)
    gate, up = (dense[::2], dense[1::2]) if name == "gpt_oss" else dense.chunk(2)
    for projection, expected in (("gate_proj", gate), ("up_proj", up)):
        key = f"base_model.model.model.layers.1.{block}.experts.2.{projection}.lora"
        a, b = export.tensors[f"{key}_A.weight"], export.tensors[f"{key}_B.weight"]
        scale = export.config["lora_alpha"] / export.config["r"]
        torch.testing.assert_close(scale * b @ a, expected, atol=1e-12, rtol=1e-12)


def test_full_names_are_given_where_short_ones_would_mean_more(tmp_path):
    target = "layers.1.mlp.experts.down_proj"
    plain, model = tuned("mixtral", target_parameters=[target], target_modules=[], alpha_pattern={})
    export = to_lora(model, tmp_path / "lora")
    assert export.config["target_parameters"] == [target]
    assert export.config["target_modules"] == []
    torch.testing.assert_close(logits(load_in_peft(plain, tmp_path / "lora")), logits(model), atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`target_modules='all-linear'` adapts the experts too")
@pytest.mark.parametrize("experts", ["stacked", "per-expert"])
def test_shared_experts_and_dense_layers_keep_their_meaning(experts, tmp_path):
    """PEFT takes `down_proj` in `target_modules` for that of the experts, which the dense layers are not."""
    plain = tiny("deepseek_v3")
    model = get_peft_model(copy.deepcopy(plain), small_config(target_modules="all-linear")).eval()
    export = to_lora(model, tmp_path / "lora", experts=experts)
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in export.config["target_parameters"]
    loaded = load_in_peft(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-12, rtol=1e-12)


def test_each_expert_is_compressed_to_its_own_best(tmp_path):
    _, model = tuned("mixtral", target_modules=[], rank_pattern={})
    adapter = open_adapter(model)
    export = to_lora(model, tmp_path / "lora", max_rank=3)
    assert (export.rank, {layer.kept for layer in export.layers}) == (3, {3})
    written = load_file(tmp_path / "lora/adapter_model.safetensors")
    lost = total = 0.0
    for name, layer in adapter.layers.items():
        pairs = pairs_of(layer, written.__getitem__)
        for factors, (a, b) in zip(adapter.matrices(name), pairs, strict=True):
            s = torch.linalg.svdvals(oracle.dense(*factors, layer.scale))
            error = (b @ a * export.config["lora_alpha"] / 3 - oracle.dense(*factors, layer.scale)).norm()
            assert float(error) == pytest.approx(float(s[3:].norm()), rel=1e-6)
            lost, total = lost + float(s[3:].square().sum()), total + float(s.square().sum())
    assert export.relative_error == pytest.approx((lost / total) ** 0.5)
    within = to_lora(model, max_error=export.relative_error * 1.0001)
    assert within.rank == 3
    assert to_lora(model, max_error=export.relative_error * 0.9999).rank == 4


def test_routers_are_parameters_of_one_matrix(tmp_path):
    plain, model = tuned(
        "mixtral", target_parameters=["gate.weight"], target_modules=[], rank_pattern={}, alpha_pattern={}
    )
    export = to_lora(model, tmp_path / "lora")
    assert export.config["target_parameters"] == ["gate.weight"]
    assert export.tensors["base_model.model.model.layers.0.mlp.gate.lora_B.weight"].shape == (4, 10)
    loaded = load_in_peft(plain, tmp_path / "lora")
    assert_all_found(loaded, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-12, rtol=1e-12)


class Words(nn.Module):
    """An embedding whose size no number of blocks divides, and convolutions."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 8, dtype=torch.float64)
        self.narrow = nn.Conv1d(8, 12, 3, padding=1, stride=2, dtype=torch.float64)
        self.wide = nn.Conv2d(4, 6, (3, 2), dtype=torch.float64)
        self.deep = nn.Conv3d(6, 8, 1, dtype=torch.float64)

    def forward(self, ids):
        x = self.narrow(self.words(ids).mT)
        x = self.wide(x.unflatten(1, (4, 3)))
        return self.deep(x.unsqueeze(-1))


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_embeddings_and_convolutions_are_those_of_pefts_lora(hybrid_r, tmp_path):
    plain = Words()
    names = ["words", "narrow", "wide", "deep"]
    model = get_peft_model(copy.deepcopy(plain), small_config(target_modules=names, hybrid_r=hybrid_r)).eval()
    export = to_lora(model, tmp_path / "lora")
    rank = 8 + hybrid_r
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in export.tensors.items()}
    assert shapes["words.lora_embedding_A"] == (rank, 13)
    assert shapes["words.lora_embedding_B"] == (8, rank)
    assert shapes["wide.lora_A.weight"] == (rank, 4, 3, 2)
    assert shapes["wide.lora_B.weight"] == (6, rank, 1, 1)
    loaded = load_in_peft(plain, tmp_path / "lora")
    assert_all_found(loaded, tmp_path / "lora")
    ids = torch.randint(0, 13, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), atol=1e-12, rtol=1e-12)
        assert not torch.allclose(plain(ids), model(ids), atol=1e-3)


def test_what_lies_beyond_the_vocabulary_counts_for_nothing(tmp_path):
    model = get_peft_model(Words(), small_config(target_modules=["words"], hybrid_r=1))
    layer = model.base_model.model.words
    with torch.no_grad():
        layer.gralora_A["default"].view(14, 4)[13] = 100.0
        layer.gralora_A_general["default"].weight[:, 13] = 100.0
    whole, compressed = to_lora(model), to_lora(model, tmp_path / "lora", max_rank=2)
    assert whole.tensors["base_model.model.words.lora_embedding_A"].abs().max() < 100
    delta = layer.get_delta_weight("default").double()
    s = torch.linalg.svdvals(delta)
    assert compressed.relative_error == pytest.approx(float(s[2:].norm() / s.norm()))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.MultiheadAttention(8, 2), r"'0.out_proj.weight' cannot .* output projection twice .* `gralora merge`"),
        (nn.Conv2d(8, 8, 3, groups=2), "'0' cannot be exported as LoRA: it is a convolution of 2 groups"),
        (nn.Conv2d(8, 8, 3, dilation=2), "'0' cannot .* PEFT's LoRA leaves out the dilation of a convolution"),
        (nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), "PEFT's LoRA leaves out the padding mode of a"),
    ],
    ids=["attention", "groups", "dilation", "padding mode"],
)
def test_what_no_lora_can_mean_is_refused(base, message, tmp_path):
    model = get_peft_model(nn.Sequential(base), small_config())
    for output in (None, tmp_path / "lora"):
        with pytest.raises(ValueError, match=message):
            to_lora(model, output)
    assert not any(tmp_path.iterdir())


def test_experts_of_other_parameters_are_not_written_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 8, 8))

    model = get_peft_model(
        nn.ModuleDict({"experts": Experts()}), small_config(target_modules=[], target_parameters=["experts.weights"])
    )
    assert to_lora(randomise(model)).rank == 8
    with pytest.raises(ValueError, match="the experts' parameter 'weights' has no names for each expert; export it"):
        to_lora(model, experts="per-expert")


def test_replicated_layers_are_for_peft_alone(tmp_path):
    config = small_config(target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2]])
    model = randomise(get_peft_model(tiny_llama(), config)).eval()
    with pytest.raises(ValueError, match=r"must fit the base model's own layers; got layer_replication=\[\(0, 2\), \("):
        to_lora(model)
    to_lora(model, tmp_path / "lora", target="peft")
    loaded = load_in_peft(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


def test_names_of_projections():
    _, model = tuned("mixtral")
    names = [projections_of(layer) for layer in open_adapter(model).layers.values() if layer.experts]
    assert names == [("w2",), ("w1", "w3")] * 2
