"""Experts of a mixture: every layout of transformers, against dense weights in float64."""

import copy

import oracle
import pytest
import torch
from conftest import assert_same_bits, weights_of
from contract import LayerContract, assert_near, layer_of
from mixtures import MODELS, Block, moe_config, routing, tiny, with_dense_updates
from peft import PeftModel
from torch import nn
from transformers import (
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from gralora import get_peft_model
from gralora.tuner.layer import gralora_layers


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
class TestModels:
    """Outputs, gradients and merges of whole models."""

    def test_output_and_gradients_are_those_of_dense_weights(self, name, tokens):
        plain = tiny(name)
        model = get_peft_model(copy.deepcopy(plain), moe_config(hybrid_r=2))
        dense = with_dense_updates(model, plain)
        y, expected = model(tokens).logits, dense(tokens).logits
        assert (expected - plain(tokens).logits).norm() > 1e-3 * expected.norm()
        assert (y - expected).norm() < 1e-6 * expected.norm()  # the models compute norms and routing in float32
        g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        y.backward(g)
        for parameter in dense.parameters():
            parameter.requires_grad_(True)
        expected.backward(g)
        of_dense = dict(dense.named_parameters())
        for layer_name, layer in gralora_layers(model.base_model.model).items():
            stored = of_dense[f"{layer_name.replace('.base_layer', '')}.{layer.parameter_name}"].grad
            matrices = stored.mT if layer.weight_ref().matrix is torch.t else stored
            leaves = [f.detach().clone().requires_grad_() for f in layer.factors("default")]
            for expert, gradient in enumerate(matrices):
                one = oracle.dense(*(leaf[expert] for leaf in leaves), 1.0)
                (one * layer.scaling["default"] * gradient).sum().backward()
            for leaf, factor in zip(leaves, layer.factors("default"), strict=True):
                assert (leaf.grad - factor.grad).norm() < 1e-5 * leaf.grad.norm()

    def test_merging_gives_the_same_output_and_unmerging_the_same_bits(self, name, tokens):
        plain = tiny(name, torch.float32)
        model = get_peft_model(copy.deepcopy(plain), moe_config())
        expected, before = model(tokens).logits, weights_of(model)
        for _ in range(2):
            model.merge_adapter(safe_merge=True)
            assert (model(tokens).logits - expected).norm() < 1e-5 * expected.norm()
            model.unmerge_adapter()
            assert_same_bits(before, weights_of(model))
        merged = model.merge_and_unload()
        assert type(merged) is type(plain)
        assert not gralora_layers(merged)
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert (merged(tokens).logits - expected).norm() < 1e-5 * expected.norm()

    @pytest.mark.filterwarnings("ignore:This adapter uses `target_parameters`")
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_saving_and_loading(self, name, tokens, low_cpu_mem_usage, tmp_path):
        plain = tiny(name, torch.float32)
        model = get_peft_model(copy.deepcopy(plain), moe_config(hybrid_r=1))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


class ExpertsContract(LayerContract):
    """One parameter of experts; the oracle is their own eager forward with other weights."""

    transforms = False  # which rows an expert gets depends on the data
    fresh_is_exact = False  # the layer sorts the rows, and sums over the experts of a token in another order

    def make(self, config, kind, dtype):
        config._experts_implementation = self.implementation(dtype)
        experts = kind(config).to(dtype)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        return experts

    def implementation(self, dtype):
        return "grouped_mm" if dtype == torch.float32 else "eager"  # which takes any width

    def make_input(self, dtype):
        return torch.randn(7, 12, dtype=dtype)

    def arguments(self, x):
        return x, *routing(x)

    def hold(self, base):
        return Block(base)

    def weight(self, base):
        return getattr(base, self.parameter).detach().double()

    def dense(self, factors, scale):
        experts = range(len(factors[0]))
        return torch.stack([oracle.dense(*(f if f is None else f[e] for f in factors), scale) for e in experts])

    def output(self, base, x, weight):
        exact = copy.deepcopy(base).double()
        exact.config._experts_implementation = "eager"
        exact._forward_hooks.clear()
        return torch.func.functional_call(exact, {self.parameter: weight}, (x, *routing(x)))

    @property
    def target(self):
        return f"layer.{self.parameter}"

    @property
    def targets(self):
        return {"target_modules": [], "target_parameters": [self.target]}

    def test_the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed(self):
        """The update is inside the base, so a hook of the base sees it, and what the hook returns is the output."""
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        expected, seen, kept = self.expected(layer, x, "default"), [], torch.ones(1)
        layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer.base_layer.register_forward_hook(lambda _, args, y: seen.append(y) or kept)
        assert self.call(layer, x) is kept
        assert seen[0] is x
        assert_near(seen[1], expected, self.exact_dtype)

    def test_one_dropout_draw_feeds_both_parts(self):
        layer, x = layer_of(self.adapt(gralora_dropout=0.5, hybrid_r=2)), self.make_input(self.exact_dtype)
        assert_near(self.call(layer.eval(), x), self.expected(layer, x, "default"), self.exact_dtype)
        torch.manual_seed(7)
        first = self.call(layer.train(), x)
        torch.manual_seed(7)
        assert torch.equal(self.call(layer, x), first)
        assert not torch.equal(self.call(layer, x), first)


class OfMixtral(ExpertsContract):
    def make_base(self, dtype):
        config = MixtralConfig(hidden_size=12, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
        return self.make(config, MixtralExperts, dtype)


class TestGateAndUp(OfMixtral):
    parameter = "gate_up_proj"


class TestDown(OfMixtral):
    parameter = "down_proj"


class TestTransposedWithBiases(ExpertsContract):
    parameter = "gate_up_proj"

    def make_base(self, dtype):
        config = GptOssConfig(hidden_size=12, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
        return self.make(config, GptOssExperts, dtype)

    def stored(self, base, delta):
        return delta.mT


class TestWithoutAGate(ExpertsContract):
    parameter = "up_proj"

    def make_base(self, dtype):
        config = NemotronHConfig(
            hidden_size=12, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, moe_latent_size=None
        )
        return self.make(config, NemotronHExperts, dtype)
