import copy
from functools import partial

import pytest
import torch
from conftest import MLP, adapted_layer, mlp_config, random_factors, tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gralora import GraloraConfig, get_peft_model
from gralora.tuner import fused
from gralora.tuner.blocks import Factors, add


def case(k=2, s=2, n=3, m=4, q=0, t=5, dtype=torch.float64, master=None):
    factors = random_factors(k, s, n, m, q, master or dtype)
    x = torch.randn(t, k * n, dtype=dtype)
    weight, bias = torch.randn(k * m, k * n, dtype=dtype), torch.randn(k * m, dtype=dtype)
    return x, weight, bias, factors


def plain(x, dropped, weight, bias, factors, scale):
    return add(nn.functional.linear(x, weight, bias), x if dropped is None else dropped, factors, scale)


@pytest.mark.parametrize("q", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("with_dropped", [False, True])
@pytest.mark.parametrize("t", [0, 1, 5, fused.FEW_TOKENS + 1])
def test_output_and_gradients_are_those_of_the_plain_path(k, q, with_dropped, t):
    x, weight, bias, factors = case(k=k, q=q, t=t)
    leaves = [x, *(f for f in factors if f is not None)] + ([torch.randn_like(x)] if with_dropped else [])
    results = []
    for function in (fused.linear, plain):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        dropped = inputs.pop() if with_dropped else None
        y = function(inputs[0], dropped, weight, bias, Factors(*inputs[1:]), 0.7)
        wanted = inputs + ([dropped] if with_dropped else [])
        results.append((y, *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(-1))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("q", [0, 2])
@pytest.mark.parametrize("with_dropped", [False, True])
def test_gradcheck(q, with_dropped, few, monkeypatch):
    monkeypatch.setattr(fused, "FEW_TOKENS", few)
    x, weight, bias, factors = case(q=q)
    inputs = [x, torch.randn_like(x), *(f for f in factors if f is not None)]
    inputs = [leaf.requires_grad_() for leaf in inputs]

    def function(x, dropped, *tensors):
        return fused.linear(x, dropped if with_dropped else None, weight, bias, Factors(*tensors), 0.7)

    assert (
        torch.autograd.gradcheck(function, inputs)
        if with_dropped
        else torch.autograd.gradcheck(lambda x, *tensors: function(x, None, *tensors), [inputs[0], *inputs[2:]])
    )


def test_a_wrong_exchange_would_be_seen(monkeypatch):
    x, weight, bias, factors = case()
    monkeypatch.setattr(fused, "exchange", lambda h: h)
    assert not torch.allclose(
        fused.linear(x, None, weight, bias, factors, 0.7), plain(x, None, weight, bias, factors, 0.7)
    )


@pytest.mark.parametrize("t", [4, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_over_float32_masters(dtype, t):
    x, weight, bias, factors = case(k=4, s=8, n=64, m=32, q=4, t=t, dtype=dtype, master=torch.float32)
    factors = Factors(*(f.requires_grad_() for f in factors))
    x.requires_grad_()
    y = fused.linear(x, None, weight, bias, factors, 0.3)
    grads = torch.autograd.grad(y.float().square().mean(), [x, *factors])
    assert y.dtype == grads[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads[1:])
    exact = plain(x.double(), None, weight.double(), bias.double(), Factors(*(f.double() for f in factors)), 0.3)
    exact_grads = torch.autograd.grad(exact.square().mean(), [x, *factors])
    for ours, theirs in zip((y, *grads), (exact, *exact_grads), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 0.02  # a few roundings to 8 bits


def test_gradients_are_made_only_where_they_are_wanted():
    x, weight, bias, factors = case(q=2)
    frozen = fused.linear(x.clone().requires_grad_(), None, weight, bias, factors, 0.7)
    frozen.sum().backward()
    first = fused.linear(x, None, weight, bias, Factors(factors.A, factors.B.requires_grad_(), *factors[2:]), 0.7)
    first.sum().backward()
    assert factors.B.grad is not None
    assert factors.A.grad is x.grad is None


# Where it is used, and where it is not --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    seen = []
    original = fused.linear
    monkeypatch.setattr(fused, "linear", lambda *args: seen.append(1) or original(*args))
    return seen


def layer_and_input(dtype=torch.float32, **changes):
    return get_peft_model(MLP(dtype), mlp_config(**changes)).base_model.model.up, torch.randn(3, 12, dtype=dtype)


@pytest.mark.parametrize("changes", [{}, {"hybrid_r": 2}, {"gralora_dropout": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_frozen_linear_takes_the_fast_path(calls, dtype, changes):
    layer, x = layer_and_input(dtype, **changes)
    layer(x)
    assert calls


@pytest.mark.parametrize("t", [3, 64])
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_autocast_to_the_dtype_of_the_weight_takes_the_fast_path(calls, hybrid_r, t):
    layer, _ = layer_and_input(torch.bfloat16, hybrid_r=hybrid_r)
    x = torch.randn(t, 12, dtype=torch.bfloat16, requires_grad=True)
    gradients = []
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            gradients.append(torch.autograd.grad(y.float().sum(), [x, layer.gralora_A["default"]]))
    for with_autocast, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_autocast, without, atol=0.05, rtol=0.05)
    assert len(calls) == 2


def test_dropout_follows_its_own_mode(calls):
    """Monte Carlo dropout: the model in eval mode, its dropouts in training mode."""
    layer, x = layer_and_input(gralora_dropout=0.5)
    layer.eval().gralora_dropout.train()
    assert not torch.equal(layer(x), layer(x))
    assert calls
    layer.train().gralora_dropout.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("t", [3, 64])
def test_activations_are_never_cast_down(t):
    x, weight, bias, factors = case(k=2, s=4, n=16, m=16, t=t, dtype=torch.float32)
    factors = Factors(factors.A.bfloat16(), factors.B.bfloat16())
    ours = fused.linear(x, None, weight, bias, factors, 0.7)
    exact = plain(x, None, weight, bias, Factors(factors.A.float(), factors.B.float()), 0.7)
    torch.testing.assert_close(ours, exact)


def test_a_product_with_the_scale_is_rounded_once():
    values = torch.randn(100, dtype=torch.bfloat16)
    assert torch.equal(fused._scaled(values, 0.3, torch.float32), values.float() * 0.3)
    assert torch.equal(fused._scaled(values.float(), 0.3, torch.bfloat16), (values.double() * 0.3).bfloat16())


def hook(module):
    module.register_forward_hook(lambda *_: None)


def set_forward(module):
    module.forward = module.forward


def parametrized(layer):
    class Same(nn.Module):
        def forward(self, x):
            return x

    parametrize.register_parametrization(layer.base_layer, "weight", Same())


NOT_THE_SAME = {
    "a hook on the base": lambda layer: hook(layer.base_layer),
    "a pre-hook on the base": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "a backward hook on the base": lambda layer: layer.base_layer.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda layer: set_forward(layer.base_layer),
    "a trainable weight": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "a trainable bias": lambda layer: layer.base_layer.bias.requires_grad_(True),
    "a parametrized weight": parametrized,
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.base_layer.eval()),
    "another subclass": lambda layer: setattr(layer.base_layer, "__class__", type("Other", (nn.Linear,), {})),
    "two adapters of which none is active": lambda layer: layer.set_adapter([]),
    "a compiled base": lambda layer: layer.base_layer.compile(backend="eager"),
    "a trained A and a frozen B": lambda layer: layer.gralora_B["default"].requires_grad_(False),
}


@pytest.mark.parametrize("change", NOT_THE_SAME.values(), ids=NOT_THE_SAME)
def test_everything_else_takes_the_plain_path(calls, change):
    layer, x = layer_and_input()
    change(layer)
    layer(x)
    assert not calls


PATCHED = [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Module, "__call__"), (nn.Module, "_call_impl")]


@pytest.mark.parametrize(("owner", "name"), [*PATCHED, (nn.functional, "linear")])
def test_a_patch_of_a_class_takes_the_plain_path_and_is_called(calls, owner, name, monkeypatch):
    layer, x = layer_and_input()
    original, heard = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: heard.append(1) or original(*args, **kwargs))
    layer.forward(x)
    assert heard and not calls
    assert owner is nn.functional or not fused._torchs_own()  # patched before gralora is imported


@pytest.mark.parametrize("t", [3, 64])
@pytest.mark.parametrize("mutation", [False, True], ids=["", "mutation allowed"])
@pytest.mark.parametrize("saved", ["mm", "addmm", "bmm", "all"])
def test_selective_checkpointing(saved, mutation, t):
    """No output that a policy has saved is added to in place."""
    layer = get_peft_model(MLP(), mlp_config(hybrid_r=2)).base_model.model
    wanted = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(t, 12, requires_grad=True)

    def policy(ctx, op, *args, **kwargs):
        keep = saved == "all" or op in (getattr(torch.ops.aten, saved).default,)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=mutation)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    gradients = torch.autograd.grad(y.square().sum(), [x, *wanted])
    torch.testing.assert_close(gradients, torch.autograd.grad(layer(x).square().sum(), [x, *wanted]))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature", "ignore:1 adapted layers cannot be merged")
@pytest.mark.parametrize("t", [3, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_autocast_does_not_touch_float64_and_complex_numbers(dtype, t):
    layer = adapted_layer(nn.Linear(6, 4, dtype=dtype), hybrid_r=2)
    base, x = layer.base_layer, torch.randn(t, 6, dtype=dtype)
    for watched in (False, True):
        if watched:
            hook(base)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y, plain(x, None, base.weight, base.bias, layer.factors("default"), 0.5))


@pytest.mark.parametrize("t", [3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_backward_pass_under_autocast(dtype, t):
    layer, _ = layer_and_input(dtype, hybrid_r=2)
    x = torch.randn(t, 12, dtype=dtype, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, g, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(y, wanted, g), expected, atol=0, rtol=0)


def test_forward_on_the_meta_device():
    layer = get_peft_model(MLP(), mlp_config()).base_model.model.to("meta")
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 6)
    hook(layer.up.base_layer)
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 6)


def test_the_fast_path_uses_what_the_holders_return(calls):
    """Hooks of offloading and sharding run on the holders, and may return another tensor."""
    layer, x = layer_and_input()
    layer.gralora_B._modules["default"].register_forward_hook(lambda module, args, weight: weight * 0)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert calls
    layer.gralora_A._modules["default"].register_forward_hook(lambda module, args, weight: weight.to("meta"))
    assert not fused.applies(layer.base_layer, x, layer.factors("default", call=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_global_hooks_take_the_plain_path(calls):
    layer, x = layer_and_input()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)
    torch.func.vmap(layer)(x[None])
    torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    torch.jit.trace(layer, x, check_trace=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    layer(x)
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert not calls


def test_both_paths_agree_on_a_whole_model():
    model = get_peft_model(
        tiny_llama(), GraloraConfig(r=8, hybrid_r=2, target_modules="all-linear", init_weights=False)
    )
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module) is nn.Linear:
            hook(module)
    tokens = torch.arange(3, 23)[None]
    grads = []
    for m in (model, other):
        m(tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-3)


class Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            self.outputs.append(result)
        return result


def test_an_output_that_a_function_mode_keeps_is_not_changed(calls):
    layer, x = layer_and_input()
    with Recorder() as recorder:
        layer(x)
    assert torch.equal(recorder.outputs[0], layer.base_layer(x))
    assert not calls
    with torch.device("cpu"):  # a mode too, and one that changes nothing
        layer(x)
    assert calls


# What autograd keeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["fused", "plain"])
@pytest.mark.parametrize("changes", [{}, {"hybrid_r": 2}])
def test_no_float32_copy_of_an_activation_is_saved(taken, changes):
    layer, _ = layer_and_input(torch.bfloat16, **changes)
    if taken == "plain":
        hook(layer.base_layer)
    x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved
    assert not [t.shape for t in saved if t.dtype == torch.float32 and 64 in t.shape]


@pytest.mark.parametrize("frozen", ["all", "A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [20, 64])
def test_frozen_factors_save_no_activation(t, dtype, frozen):
    """The gradient of A needs x, that of B the middle tensor."""
    layer, _ = layer_and_input(dtype, hybrid_r=2)
    for name, p in layer.named_parameters():
        p.requires_grad_("gralora_" in name and frozen != "all" and f"gralora_{frozen}" not in name)
    x = torch.randn(t, 12, dtype=dtype, requires_grad=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: shapes.append(s.shape) or s, lambda s: s):
        layer(x)
    kept = {size for shape in shapes if t in shape for size in shape if size != t}
    middle = {2, 3, 6}  # [k, t, r] and [t, hybrid_r]
    assert {"all": not kept, "A": kept <= middle, "B": kept <= {3, 4, 12}}[frozen], kept


# Compilers ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_compiles_whole_once_for_all_lengths_and_exports(hybrid_r):
    model = get_peft_model(MLP(), mlp_config(hybrid_r=hybrid_r)).base_model.model
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for t in (5, 7, 9, 11):
        x = torch.randn(2, t, 12)
        expected, found = (
            (y := forward(x), *torch.autograd.grad(y.square().sum(), wanted)) for forward in (model, compiled)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2  # the first length, then any

    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},)).module()
    for t in (11, 13):
        x = torch.randn(2, t, 12)
        torch.testing.assert_close(exported(x), model(x))
