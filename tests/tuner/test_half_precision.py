"""Errors of half precision against float64, compared with those of PEFT's own GraLoRA on the same tensors."""

import math

import oracle
import pytest
import torch
from conftest import get_native_peft_model
from torch import nn

from gralora import GraloraConfig, get_peft_model

NAMES = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
WIDTH_IN, WIDTH_OUT, SETTINGS = 16, 24, {"r": 8, "gralora_k": 2, "hybrid_r": 2, "target_modules": ["layer"]}


def adapted(adapt, dtype, alpha, tensors):
    base = nn.ModuleDict({"layer": nn.Linear(WIDTH_IN, WIDTH_OUT, dtype=dtype)})
    weight, bias, *factors = tensors
    base["layer"].weight.data, base["layer"].bias.data = weight.to(dtype), bias.to(dtype)
    layer = adapt(base, alpha).base_model.model["layer"]
    wanted = []
    for name, value in zip(NAMES, factors, strict=True):
        held = getattr(layer, name)["default"]
        parameter = held.weight if isinstance(held, nn.Module) else held
        parameter.data = value.to(parameter.dtype)
        wanted.append(parameter)
    return layer, wanted


def ours(base, alpha):
    return get_peft_model(base, GraloraConfig(alpha=alpha, **SETTINGS))


def native(base, alpha):
    return get_native_peft_model(base, alpha=alpha, **SETTINGS)


def output_and_gradients(layer, wanted, x, g, autocast=None):
    x = x.to(layer.base_layer.weight.dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *wanted], g.to(y.dtype))


def relative_errors(values, exact):
    return {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(("y", "x", *NAMES), values, exact, strict=True)
    }


def compare(dtype, t, size_of_b, scale=2.0, size_of_g=1e-2, watched=False, autocast=False, native_autocast=False):
    """Return our errors and those of PEFT's GraLoRA, of the output and of the gradients."""
    alpha = scale * (SETTINGS["r"] + SETTINGS["hybrid_r"])
    factors = torch.randn(2, 8, 8) / 3, torch.randn(2, 8, 12), torch.randn(2, 16) / 4, torch.randn(24, 2)
    factors[1].mul_(size_of_b)
    factors[3].mul_(size_of_b)
    tensors = torch.randn(24, 16).to(dtype), torch.randn(24).to(dtype), *factors
    x, g = torch.randn(t, WIDTH_IN).to(dtype), (size_of_g * torch.randn(t, WIDTH_OUT)).to(dtype)
    layer, wanted = adapted(ours, dtype, alpha, tensors)
    if watched:
        layer.base_layer.register_forward_hook(lambda *_: None)
    values = output_and_gradients(layer, wanted, x, g, dtype if autocast else None)
    theirs = output_and_gradients(*adapted(native, dtype, alpha, tensors), x, g, dtype if native_autocast else None)
    exact = output_and_gradients(*adapted(native, torch.float64, alpha, tensors), x.double(), g.double())
    return relative_errors(values, exact), relative_errors(theirs, exact)


def assert_no_worse(own, theirs, slack):
    """Their errors are NaN where PEFT's products overflow."""
    worse = {name: (own[name], theirs[name]) for name in own if not own[name] <= bound(theirs[name]) + slack}
    assert not worse


def bound(error):
    return torch.inf if math.isnan(error) else 1.1 * error


@pytest.mark.parametrize("size_of_b", [1e-8, 1e-4, 1.0, 1e2])
@pytest.mark.parametrize("t", [1, 33, 8192])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("watched", [False, True], ids=["fast path", "plain path"])
def test_float16_is_as_close_as_float32_products(watched, autocast, t, size_of_b):
    """PEFT without autocast computes in float32; what is left of the error is that of float32 sums."""
    assert_no_worse(*compare(torch.float16, t, size_of_b, watched=watched, autocast=autocast), slack=1e-6)


@pytest.mark.parametrize("size_of_b", [1e-8, 1.0, 1e2])
@pytest.mark.parametrize("t", [1, 33, 8192])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("watched", [False, True], ids=["fast path", "plain path"])
def test_bfloat16_is_as_close_as_the_same_formula_in_bfloat16(watched, autocast, t, size_of_b):
    own, theirs = compare(torch.bfloat16, t, size_of_b, watched=watched, autocast=autocast, native_autocast=True)
    assert_no_worse(own, theirs, slack=5e-4)  # roundings to 8 bits, a quarter of one


@pytest.mark.parametrize("watched", [False, True], ids=["fast path", "plain path"])
@pytest.mark.parametrize(("scale", "size_of_b"), [(1e6, 1e-7), (3e-6, 1e5), (0.3, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_for_any_scale(dtype, scale, size_of_b, watched):
    own, theirs = compare(dtype, 40, size_of_b, scale, watched=watched, native_autocast=dtype == torch.bfloat16)
    assert_no_worse(own, theirs, slack=1e-6 if dtype == torch.float16 else 5e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("watched", [False, True], ids=["fast path", "plain path"])
def test_large_middle_tensors_and_sums_stay_finite_in_float16(watched, autocast):
    """x·A is 3e5, and dA and dB are sums of 8192 tokens above 1e6."""
    layer, wanted = adapted(ours, torch.float16, 10.0, [*(torch.zeros(*s) for s in ((24, 16), (24,))), *LARGE])
    if watched:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x, g = torch.full((8192, WIDTH_IN), 200.0), torch.ones(8192, WIDTH_OUT)
    y, _, *gradients = output_and_gradients(layer, wanted, x, g, torch.float16 if autocast else None)
    expected = 8 * (200.0 * 200 * 8) * 1e-3 + 2 * (200.0 * 200 * 16) * 1e-3
    torch.testing.assert_close(y, torch.full_like(y, expected))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 1e4 for gradient in gradients)


LARGE = (
    torch.full((2, 8, 8), 200.0),
    torch.full((2, 8, 12), 1e-3),
    torch.full((2, WIDTH_IN), 200.0),
    torch.full((WIDTH_OUT, 2), 1e-3),
)


@pytest.mark.parametrize("t", [3, 40])
@pytest.mark.parametrize("watched", [False, True], ids=["fast path", "plain path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float16, torch.float64),
    ],
)
def test_factors_of_different_dtypes(dtypes, dtype, watched, t):
    layer, wanted = adapted(ours, dtype, 10.0, [torch.randn(24, 16), torch.randn(24), *(f / 200 for f in LARGE)])
    for parameter, other in zip(wanted, dtypes, strict=True):
        parameter.data = torch.randn_like(parameter).to(other)
    if watched:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x, g = torch.randn(t, WIDTH_IN).to(dtype), torch.randn(t, WIDTH_OUT).to(dtype)
    values = output_and_gradients(layer, wanted, x, g)
    assert [v.dtype for v in values] == [dtype, dtype, *dtypes]
    tensors = [p.detach() for p in (layer.base_layer.weight, layer.base_layer.bias, *wanted)]
    exact = output_and_gradients(*adapted(native, torch.float64, 10.0, tensors), x.double(), g.double())
    assert max(relative_errors(values, exact).values()) < 0.01  # roundings to the 8 bits of bfloat16


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("tokens", [8, 40])
def test_float16_parameters_keep_a_small_update_with_a_small_scale(tokens, path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"l": nn.Linear(16, 24, dtype=torch.float16)})
    config = GraloraConfig(r=8, target_modules=["l"], alpha=8 / 64)
    layer = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model["l"]
    if path == "plain":
        layer.base_layer.register_forward_hook(lambda *_: None)
    layer.gralora_B["default"].data = (torch.randn(2, 8, 12) * 1e-5).half()
    x, g = torch.randn(tokens, 16).half(), torch.randn(tokens, 24).half()
    layer(x).backward(g)
    A, B = (layer.gralora_A["default"].detach().double().requires_grad_(), layer.gralora_B["default"].detach().double())
    oracle.apply(x.double(), A, B, None, None, layer.scaling["default"]).backward(g.double())
    found = layer.gralora_A["default"].grad.double()
    # Half a step of float16's smallest numbers, or of its 11 bits.
    assert ((found - A.grad).abs() <= 2**-25 + 2**-10 * A.grad.abs()).all()
