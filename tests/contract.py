"""What every layer kind must do, written once.

A kind's test file subclasses `LayerContract` and says how to make one, and what its output is for a given weight:

    class TestLinear(LayerContract):
        def make_base(self, dtype):
            return nn.Linear(12, 24, dtype=dtype)

        def make_input(self, dtype):
            return torch.randn(2, 5, 12, dtype=dtype)

        def output(self, base, x, weight):
            return nn.functional.linear(x, weight, base.bias.double())

Both sides of the base's matrix must be divisible by 1, 2, 3 and 4, but for the input of a kind that pads it, and one of
them not by 5. Everything is compared
with the dense update of `oracle`, added to the weight in float64.
"""

import copy
import pickle
from collections import OrderedDict
from typing import ClassVar

import oracle
import pytest
import torch
from conftest import assert_same_bits, weights_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from gralora import GraloraConfig, GraloraLayer, get_peft_model

NAMES = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
# Relative to the norm of what is expected: a few roundings of each dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
blocks = pytest.mark.parametrize(("k", "hybrid_r"), [(1, 0), (2, 0), (3, 2), (4, 3)])


def assert_near(found, expected, dtype):
    """Assert that `found` differs from `expected` by the rounding errors of `dtype`."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCE[dtype]


def factors_of(layer, name="default"):
    """Return the four tensors of one adapter, None for an absent hybrid part."""
    holders = [getattr(layer, container)._modules.get(name) for container in NAMES]
    return tuple(None if holder is None else holder.weight for holder in holders)


def hold(base):
    """Return a model whose only layer is `base`, under the name "layer"."""
    return nn.Sequential(OrderedDict(layer=base))


def layer_of(model):
    """Return the adapted layer of a model that `LayerContract.adapt` made."""
    return model.base_model.model.layer


def copy_by_pickle(thing):
    """Return a copy of `thing` that went through pickle."""
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.usefixtures("one_thread")
class LayerContract:
    """The tests of one layer kind. Flags say what a kind cannot do; set one only with its reason beside it."""

    exact_dtype = torch.float64  # the widest dtype in which the base computes
    rounds_once = True  # a merged weight is the exact sum, rounded to the stored dtype
    transforms = True  # the base works under torch.func.vmap
    fresh_is_exact = True  # the layer calls the base's own products
    takes_ids = False  # the input is integers, which have no gradient and are not dropped out

    target = "layer"  # what an error calls the adapted weight
    targets: ClassVar = {"target_modules": ["layer"]}

    # A kind says this -------------------------------------------------------------------------------------------------

    def make_base(self, dtype):
        """Return a new base module in `dtype`."""
        raise NotImplementedError

    def make_input(self, dtype):
        """Return a random input for it."""
        raise NotImplementedError

    def output(self, base, x, weight):
        """Return the output of `base` with `weight` in place of its own, all in float64, without gralora."""
        raise NotImplementedError

    def stored(self, base, delta):
        """Return the dense update `[out, in]` in the shape in which `base` stores its weight."""
        return delta

    def weight(self, base):
        """Return the weight of `base` in float64."""
        return base.weight.detach().double()

    def dense(self, factors, scale):
        """Return the dense update by the oracle."""
        return oracle.dense(*factors, scale)

    def arguments(self, x):
        """Return the arguments of a call of the base with the input `x`."""
        return (x,)

    def hold(self, base):
        """Return a model of the input alone whose only layer is `base`, under the name "layer"."""
        return hold(base)

    def exact(self, x):
        """Return `x` as `output` takes it."""
        return x.double() if x.is_floating_point() else x

    def call(self, module, x):
        """Return the output of the base, or of the layer on it."""
        return module(*self.arguments(x))

    # Builders ---------------------------------------------------------------------------------------------------------

    def config(self, k=2, **changes):
        settings = {"r": 2 * k, "gralora_k": k, "alpha": 3.0, "init_weights": False}
        return GraloraConfig(**(settings | self.targets | changes))

    def make_leaf(self, dtype):
        """Return an input that gets a gradient, if it is of numbers and not of ids."""
        x = self.make_input(dtype)
        return x.requires_grad_(x.is_floating_point())

    def adapt(self, dtype=None, base=None, **changes):
        base = self.make_base(dtype or self.exact_dtype) if base is None else base
        return get_peft_model(self.hold(base), self.config(**changes))

    def adapt_twice(self, dtype=None):
        model = self.adapt(dtype, hybrid_r=2)
        model.add_adapter("second", self.config(k=3))
        return model

    def expected(self, layer, x, *names, scale=1.0):
        """Return the output of the base plus the dense updates of the named adapters, times `scale`, in float64."""
        deltas = [scale * self.dense(factors_of(layer, name), layer.scaling[name]) for name in names]
        return self.dense_output(layer.get_base_layer(), x, *deltas).detach()

    def dense_output(self, base, x, *deltas):
        return self.output(base, self.exact(x), self.weight(base) + sum(self.stored(base, delta) for delta in deltas))

    def assert_merged(self, found, expected, dtype):
        if self.rounds_once:
            assert_near(found, expected, dtype)
        else:  # quantised again; to 4 bits costs 9 %
            assert (found.double() - expected).norm() < 0.15 * expected.norm()

    # Forward ----------------------------------------------------------------------------------------------------------

    @blocks
    def test_forward_is_that_of_the_dense_update(self, k, hybrid_r):
        layer, x = layer_of(self.adapt(k=k, hybrid_r=hybrid_r)), self.make_input(self.exact_dtype)
        assert_near(self.call(layer, x), self.expected(layer, x, "default"), self.exact_dtype)

    @blocks
    def test_gradients_are_those_of_the_dense_update(self, k, hybrid_r):
        layer, x = layer_of(self.adapt(k=k, hybrid_r=hybrid_r)), self.make_input(self.exact_dtype)
        factors = factors_of(layer)
        exact = [self.exact(x), *(f if f is None else f.detach().double() for f in factors)]
        results = []
        for leaves, forward in (
            ((x, *factors), lambda x, *_: self.call(layer, x)),
            (exact, lambda x, *f: self.dense_output(layer.base_layer, x, self.dense(f, layer.scaling["default"]))),
        ):
            wanted = [leaf.requires_grad_() for leaf in leaves if leaf is not None and leaf.is_floating_point()]
            y = forward(*leaves)
            g = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
            results.append(torch.autograd.grad(y, wanted, g.to(y.dtype)))
        for found, expected in zip(*results, strict=True):
            assert_near(found, expected, self.exact_dtype)

    @pytest.mark.parametrize("hybrid_r", [0, 2])
    def test_a_fresh_adapter_changes_nothing_exactly(self, hybrid_r):
        layer = layer_of(self.adapt(torch.float32, hybrid_r=hybrid_r, init_weights=True))
        x = self.make_input(torch.float32)
        if self.fresh_is_exact:
            assert torch.equal(self.call(layer, x), self.call(layer.base_layer, x))
        else:
            assert_near(self.call(layer, x), self.call(layer.base_layer, x), torch.float32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_near_the_dense_update(self, dtype):
        layer, x = layer_of(self.adapt(dtype, hybrid_r=2)), self.make_leaf(dtype)
        y = self.call(layer, x)
        assert_near(y, self.expected(layer, x.detach(), "default"), dtype)
        y.sum().backward()
        assert y.dtype == dtype
        assert not x.requires_grad or x.grad.dtype == dtype
        assert layer.gralora_A["default"].grad.dtype == torch.float32

    def test_the_output_dtype_under_autocast_is_that_of_the_base(self):
        layer, x = layer_of(self.adapt(torch.float32, hybrid_r=2)), self.make_input(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, base = self.call(layer, x), self.call(layer.base_layer, x)
        assert y.dtype == base.dtype
        assert_near(y, self.expected(layer, x, "default"), torch.bfloat16)

    def test_a_forward_and_backward_pass_changes_no_weight(self):
        model = self.adapt(torch.float32, hybrid_r=2)
        before = copy.deepcopy(model.state_dict())
        model(self.make_input(torch.float32)).sum().backward()
        assert_same_bits(before, model.state_dict())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modes_without_gradients_give_the_same_output(self, mode):
        model, x = self.adapt(hybrid_r=2), self.make_input(self.exact_dtype)
        expected = self.expected(layer_of(model), x, "default")
        with mode():
            y = model(x.clone())
        assert not y.requires_grad
        assert_near(y, expected, self.exact_dtype)

    def test_the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed(self):
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        kept = 2 * self.call(layer.base_layer, x).detach()
        before = kept.clone()
        layer.base_layer.register_forward_hook(lambda *_: kept)
        assert_near(self.call(layer, x), self.expected(layer, x) + self.expected(layer, x, "default"), self.exact_dtype)
        assert torch.equal(kept, before)

    def test_one_dropout_draw_feeds_both_parts(self):
        layer, x = layer_of(self.adapt(gralora_dropout=0.5, hybrid_r=2)), self.make_input(self.exact_dtype)
        torch.manual_seed(7)
        dropped = x if self.takes_ids else nn.functional.dropout(x, 0.5)
        updates = [self.expected(layer, seen, "default") - self.expected(layer, seen) for seen in (dropped, x)]
        for training, update in zip((True, False), updates, strict=True):
            layer.train(training)
            torch.manual_seed(7)
            assert_near(self.call(layer, x) - self.call(layer.base_layer, x), update, self.exact_dtype)

    def test_the_holders_of_the_factors_are_called(self):
        """Offloading and sharding fetch a tensor in the hooks of its holder."""
        layer, seen = layer_of(self.adapt(hybrid_r=2)), []
        for name in NAMES:
            getattr(layer, name)._modules["default"].register_forward_hook(lambda *_, name=name: seen.append(name))
        self.call(layer, self.make_input(self.exact_dtype))
        assert sorted(seen) == sorted(NAMES)

    def test_adapter_names_are_refused_before_the_base_runs(self):
        """A kind that takes a different adapter for each row replaces this test."""
        layer, x, calls = layer_of(self.adapt_twice()), self.make_input(self.exact_dtype), []
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(NotImplementedError, match="`adapter_names`"):
            layer(x, adapter_names=["default"] * len(x))
        assert not calls

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model, x = self.adapt(hybrid_r=2), self.make_leaf(self.exact_dtype)
        wanted = [leaf for leaf in (x, *model.parameters()) if leaf.requires_grad]
        expected = torch.autograd.grad(model(x).square().sum(), wanted)
        y = checkpoint(model, x, use_reentrant=False)
        assert_all_equal(torch.autograd.grad(y.square().sum(), wanted), expected)

    @pytest.mark.usefixtures("unchecked_shapes")
    def test_compiles_whole(self):
        model, x = self.adapt(torch.float32, hybrid_r=2), self.make_input(torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
        wanted = [p for p in model.parameters() if p.requires_grad]
        results = [(y := forward(x), *torch.autograd.grad(y.sum(), wanted)) for forward in (model, compiled)]
        for found, expected in zip(*results, strict=True):
            assert_near(found, expected, torch.float32)

    def test_functional_call_under_vmap_gives_the_gradients_of_each_sample(self):
        if not self.transforms:
            pytest.skip("the product of this base, an autograd function of another library, has no rule for vmap")
        model = self.adapt(hybrid_r=2).base_model.model
        xs = torch.stack([self.make_input(self.exact_dtype) for _ in range(3)])
        parameters = {name: p.detach() for name, p in model.named_parameters() if "gralora_" in name}

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
        for i, x in enumerate(xs):
            for name, gradient in torch.func.grad(loss)(parameters, x).items():
                assert_near(gradients[name][i], gradient, self.exact_dtype)

    # Adapters, several of them ----------------------------------------------------------------------------------------

    def test_active_adapters_add_up_switch_and_disable(self):
        model, x = self.adapt_twice(), self.make_input(self.exact_dtype)
        layer = layer_of(model)
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            assert_near(model(x), self.expected(layer, x, *active), self.exact_dtype)
        with model.disable_adapter():
            assert torch.equal(model(x), self.call(layer.base_layer, x))
        assert_near(model(x), self.expected(layer, x, *active), self.exact_dtype)

    def test_deleting_an_adapter_leaves_nothing_of_it(self):
        model, x = self.adapt_twice(), self.make_input(self.exact_dtype)
        layer = layer_of(model)
        model.set_adapter("second")
        model.delete_adapter("default")
        assert all(set(getattr(layer, a)) == {"second"} for a in ("gralora_A", "gralora_B", *layer.other_param_names))
        assert not any("default" in name for name, _ in layer.named_modules())
        assert_near(model(x), self.expected(layer, x, "second"), self.exact_dtype)

    def test_scales_multiply_the_update(self):
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        expected = {scale: self.expected(layer, x, "default", scale=scale) for scale in (1, 2, 6)}
        for change, scale in (
            (lambda: layer.scale_layer(2.0), 2),
            (lambda: layer.scale_layer(3.0), 6),
            (lambda: layer.unscale_layer(3.0), 2),
            (lambda: layer.unscale_layer(), 1),
            (lambda: layer.set_scale("default", 6.0), 6),
            (lambda: layer.set_scale("default", 2.0), 2),
            (lambda: layer.set_scale("absent", 3.0), 2),
        ):
            change()
            assert_near(self.call(layer, x), expected[scale], self.exact_dtype)

    # Merging ----------------------------------------------------------------------------------------------------------

    @blocks
    def test_the_delta_weight_is_the_dense_update_as_stored(self, k, hybrid_r):
        layer = layer_of(self.adapt(k=k, hybrid_r=hybrid_r))
        delta = self.dense(factors_of(layer), layer.scaling["default"])
        assert_near(layer.get_delta_weight("default"), self.stored(layer.base_layer, delta), self.exact_dtype)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_merge_gives_the_outputs_of_the_adapter_and_unmerge_the_same_bits(self, dtype):
        if dtype is torch.float64 and self.exact_dtype is not dtype:
            pytest.skip("the base of this kind has no float64")
        model, x = self.adapt(dtype, hybrid_r=2), self.make_input(dtype)
        layer = layer_of(model)
        before, y, expected = weights_of(model), model(x), self.expected(layer, x, "default")
        exact = self.weight(layer.base_layer) + layer.get_delta_weight("default")
        for _ in range(2):
            model.merge_adapter()
            self.assert_merged(model(x), expected, dtype)
            if self.rounds_once:
                assert_rounded_once(layer.weight_ref().parameter, exact)
            model.unmerge_adapter()
            assert_same_bits(before, weights_of(model))
        assert torch.equal(model(x), y)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_merge_of_half_precision_factors_is_computed_in_float32(self, dtype):
        if not self.rounds_once:
            pytest.skip("this kind quantises a merged weight again, which hides how the sum was rounded")
        layer = layer_of(self.adapt(dtype))
        for factors in (layer.gralora_A, layer.gralora_B):
            factors["default"] = factors["default"].to(dtype)
        delta, exact = layer.get_delta_weight("default"), self.weight(layer.base_layer)
        assert delta.dtype == torch.float32
        layer.merge()
        assert_rounded_once(layer.weight_ref().parameter, exact + delta)

    def test_several_merges_add_up_and_come_off(self):
        model, x = self.adapt_twice(torch.float32), self.make_input(torch.float32)
        layer = layer_of(model)
        model.base_model.set_adapter(["default", "second"])
        before, expected = weights_of(model), self.expected(layer, x, "default", "second")
        model.merge_adapter(["second"])
        self.assert_merged(model(x), expected, torch.float32)
        with pytest.warns(UserWarning, match="additionally merging default"):
            model.merge_adapter(["default", "second"])
        self.assert_merged(model(x), expected, torch.float32)
        assert layer.merged_adapters == ["second", "default"]
        model.unmerge_adapter()
        assert_same_bits(before, weights_of(model))

    def test_what_happens_to_the_adapter_while_it_is_merged_does_not_matter(self):
        model, x = self.adapt(torch.float32), self.make_input(torch.float32)
        before = weights_of(model)
        model.merge_adapter()
        merged = model(x)
        with torch.no_grad():
            layer_of(model).gralora_B["default"].normal_()
        layer_of(model).set_scale("default", 7.0)
        assert torch.equal(model(x), merged)
        model.unmerge_adapter()
        assert_same_bits(before, weights_of(model))

    def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(self):
        model = self.adapt_twice(torch.float32)
        before = weights_of(model)
        with torch.no_grad():
            layer_of(model).gralora_B["second"][0, 0, 0] = float("inf")
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"finite.*at 'layer'; no layer was merged"):
                merge(adapter_names=["default", "second"], safe_merge=True)
            assert_same_bits(before, weights_of(model))
            assert not layer_of(model).merged

    def test_a_conversion_while_merged_keeps_the_way_back(self):
        model = self.adapt(torch.float32)
        before = {name: weight.double() for name, weight in weights_of(model).items()}
        model.merge_adapter()
        model.double()
        assert layer_of(model).merged
        model.unmerge_adapter()
        assert_same_bits(before, {name: weight.double() for name, weight in weights_of(model).items()})

    @pytest.mark.parametrize("merged", [False, True])
    def test_unload_gives_the_base_back(self, merged):
        base = self.make_base(torch.float32)
        pristine = copy.deepcopy(base)
        model = self.adapt(base=base)
        if merged:
            model.merge_adapter()
        plain = model.unload()
        assert plain.layer is base
        assert_same_bits(pristine.state_dict(), base.state_dict())

    def test_merge_and_unload_gives_a_module_of_the_base_s_type(self):
        model, x = self.adapt(torch.float32, hybrid_r=2), self.make_input(torch.float32)
        expected, kind = self.expected(layer_of(model), x, "default"), type(layer_of(model).base_layer)
        names = layer_of(model).base_layer.state_dict().keys()
        plain = model.merge_and_unload()
        assert type(plain.layer) is kind
        assert plain.layer.state_dict().keys() == names
        self.assert_merged(plain(x), expected, torch.float32)

    # Copies and files -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("through", [copy.deepcopy, copy_by_pickle])
    @pytest.mark.parametrize("merged", [False, True])
    def test_copies_are_whole_and_independent(self, through, merged):
        layer, x = layer_of(self.adapt(torch.float32, hybrid_r=2)), self.make_input(torch.float32)
        before = weights_of(layer)
        if merged:
            layer.merge()
        expected, twin = self.call(layer, x), through(layer)
        assert torch.equal(self.call(twin, x), expected)
        with torch.no_grad():
            layer.gralora_B["default"].zero_()
        assert twin.gralora_B["default"].any()
        assert torch.equal(self.call(twin, x), expected)
        if merged:
            twin.unmerge()
            assert_same_bits(before, weights_of(twin))

    def test_the_state_dict_names_are_those_of_the_base_and_the_factors(self):
        layer = layer_of(self.adapt_twice())
        base = {f"base_layer.{name}" for name in layer.base_layer.state_dict()}
        factors = {f"{name}.default.weight" for name in NAMES} | {f"{name}.second.weight" for name in NAMES[:2]}
        assert layer.state_dict().keys() == base | factors
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {n for n in factors if "default" in n}

    @pytest.mark.filterwarnings("ignore:This adapter uses `\\w+`")
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_saving_and_loading_is_bit_for_bit(self, low_cpu_mem_usage, tmp_path):
        base = self.make_base(torch.float32)
        pristine, x = copy.deepcopy(base), self.make_input(torch.float32)
        model = self.adapt(base=base, hybrid_r=2).eval()
        model.save_pretrained(tmp_path)
        suffixes = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
        files = load_file(tmp_path / "adapter_model.safetensors")
        assert files.keys() == {f"base_model.model.layer.{suffix}" for suffix in suffixes}  # as PEFT's own writes them
        # Trainable as the first one is: for inference alone, a 4-bit base may compute by another kernel.
        loaded = PeftModel.from_pretrained(
            self.hold(pristine), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert_all_equal(factors_of(layer_of(loaded)), factors_of(layer_of(model)))
        with torch.no_grad():  # some products of torch depend on whether gradients are asked for
            assert torch.equal(loaded(x), model(x))

    # Putting it on ----------------------------------------------------------------------------------------------------

    def test_an_adapter_can_be_made_on_the_meta_device(self):
        model = get_peft_model(
            self.hold(self.make_base(torch.float32)), self.config(hybrid_r=2), low_cpu_mem_usage=True
        )
        assert all(factor.is_meta for factor in factors_of(layer_of(model)))

    def test_blocks_that_do_not_fit_are_refused_by_the_name_of_the_module(self):
        base = self.make_base(torch.float32)
        model = self.hold(base)
        with pytest.raises(
            ValueError, match=rf"'{self.target}' cannot be adapted: `gralora_k` must divide .*; got .*=5"
        ):
            get_peft_model(model, self.config(k=5))
        assert model.layer is base

    def test_the_layer_is_not_of_the_base_s_type(self):
        """Tools that swap modules by type find the base under the layer."""
        layer = layer_of(self.adapt())
        assert isinstance(layer, GraloraLayer)
        assert not isinstance(layer, type(layer.base_layer))


def assert_all_equal(found, expected):
    """Assert that two sequences hold the same tensors, bit for bit."""
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def assert_rounded_once(weight, exact):
    """Assert that `weight` is the sum `exact`, computed in at least float32, rounded to its dtype."""
    if weight.dtype.itemsize == 2:
        assert torch.equal(weight, exact.float().to(weight.dtype))
    else:
        assert_near(weight, exact, weight.dtype)
