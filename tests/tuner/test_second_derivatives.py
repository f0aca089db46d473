"""Second derivatives through the fast path, by every API of torch that computes them."""

import pytest
import torch
from conftest import MLP, adapted_layer, mlp_config
from torch import autograd, nn
from torch.autograd import functional
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gralora import get_peft_model
from gralora.tuner import fused
from gralora.tuner.blocks import Factors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own use of it
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("q", [0, 2])
@pytest.mark.parametrize("with_dropped", [False, True])
def test_gradgradcheck(with_dropped, q, few, monkeypatch):
    monkeypatch.setattr(fused, "FEW_TOKENS", few)
    k, n, r, m, t = 2, 2, 2, 3, 3
    weight, bias = torch.randn(k * m, k * n).double(), torch.randn(k * m).double()
    inputs = [torch.randn(t, k * n), torch.randn(k, n, r), torch.randn(k, r, m)]
    inputs += [torch.randn(q, k * n), torch.randn(k * m, q)] if q else []
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    kept = torch.tensor([0.0, 2.0, 2.0, 0.0]).double()

    def function(x, *tensors):
        return fused.linear(x, x * kept if with_dropped else None, weight, bias, Factors(*tensors), 0.7)

    assert autograd.gradgradcheck(function, inputs)


@pytest.fixture(params=[(3, 0), (40, 2)], ids=["few tokens", "many tokens, hybrid"])
def problem(request):
    """A loss of a model on the fast path, of the same one on the plain path, and their parameters."""
    tokens, hybrid_r = request.param
    model = get_peft_model(MLP(torch.float64), mlp_config(hybrid_r=hybrid_r))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: p.data.double().requires_grad_() for name, p in parameters.items()}
    x = torch.randn(tokens, 12, dtype=torch.float64)

    def loss(tensors):
        return functional_call(model, tensors, (x,)).sigmoid().square().sum()

    def plain_loss(tensors):
        handles = [
            module.register_forward_hook(lambda *_: None) for module in model.modules() if type(module) is nn.Linear
        ]
        result = loss(tensors)
        for handle in handles:
            handle.remove()
        return result

    return loss, plain_loss, parameters


def gradient_penalty(loss, parameters):
    first = autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    return autograd.grad(sum(g.square().sum() for g in first), list(parameters.values()))


def backward_to_named_inputs(loss, parameters):
    tensors = list(parameters.values())
    autograd.backward(loss(parameters), inputs=tensors, create_graph=True)
    first, kept = [p.grad for p in tensors], [p.grad.detach().clone() for p in tensors]
    for p in tensors:
        p.grad = None
    second = autograd.grad(sum(g.square().sum() for g in first), tensors)
    return *kept, *second


def meta_gradient(loss, parameters):
    """Through one step of gradient descent, as in MAML."""
    first = autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), first, strict=True)}
    return autograd.grad(loss(stepped), list(parameters.values()))


def of_functional(name):
    def caller(loss, parameters):
        tensors = tuple(parameters.values())
        generator = torch.Generator().manual_seed(0)
        v = tuple(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in tensors)
        return getattr(functional, name)(lambda *t: loss(dict(zip(parameters, t, strict=True))), tensors, v)[1]

    return caller


def hessian(loss, parameters, **options):
    name = next(iter(parameters))
    return functional.hessian(lambda p: loss(parameters | {name: p}), parameters[name], **options)


def checkpointed(loss, parameters):
    return gradient_penalty(lambda tensors: checkpoint(loss, tensors, use_reentrant=False), parameters)


def saved_elsewhere(loss, parameters):
    with autograd.graph.save_on_cpu():
        return gradient_penalty(loss, parameters)


CALLERS = {
    "gradient penalty": gradient_penalty,
    "backward(inputs=)": backward_to_named_inputs,
    "meta-gradient": meta_gradient,
    "hvp": of_functional("hvp"),
    "vhp": of_functional("vhp"),
    "jvp": of_functional("jvp"),
    "vjp": lambda loss, parameters: functional.vjp(
        lambda *t: loss(dict(zip(parameters, t, strict=True))), tuple(parameters.values())
    )[1],
    "hessian": hessian,
    "hessian, vectorized": lambda loss, parameters: hessian(loss, parameters, vectorize=True),
    "torch.func.hessian": lambda loss, parameters: torch.func.hessian(
        lambda p: loss(parameters | {next(iter(parameters)): p})
    )(next(iter(parameters.values()))),
    "checkpointed": checkpointed,
    "save_on_cpu": saved_elsewhere,
}


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_every_caller_gets_the_plain_path_s_derivatives(caller, problem):
    loss, plain_loss, parameters = problem
    torch.testing.assert_close(caller(loss, parameters), caller(plain_loss, parameters))


@pytest.mark.parametrize("changes", [{}, {"hybrid_r": 2}, {"gralora_dropout": 0.5}])
@pytest.mark.parametrize("tokens", [3, 40])
def test_vectorized_jacobians(tokens, changes):
    layer = get_peft_model(MLP(), mlp_config(**changes)).base_model.model.up
    x = torch.randn(tokens, 12, requires_grad=True)
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    directions = torch.randn(4, *y.shape)
    batched = autograd.grad(y, wanted, directions, retain_graph=True, is_grads_batched=True)
    one_by_one = [autograd.grad(y, wanted, direction, retain_graph=True) for direction in directions]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def test_a_backward_pass_can_be_repeated():
    layer = get_peft_model(MLP(), mlp_config(hybrid_r=2)).base_model.model.up
    for tokens in (3, 40):
        x = torch.randn(tokens, 12, requires_grad=True)
        y, g = layer(x), torch.randn(tokens, 24)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        first, second = (autograd.grad(y, wanted, g, retain_graph=True) for _ in range(2))
        differentiable = autograd.grad(y, wanted, g, create_graph=True)
        torch.testing.assert_close(first, second, atol=0, rtol=0)
        torch.testing.assert_close(first, differentiable)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature", "ignore:1 adapted layers cannot be merged")
@pytest.mark.parametrize("tokens", [3, 40])
def test_complex_numbers(tokens):
    """Gradients and second derivatives of a complex layer are those of its dense weight."""
    layer = adapted_layer(nn.Linear(12, 24, dtype=torch.complex128), r=6, gralora_k=3, hybrid_r=2)
    x = torch.randn(tokens, 12, dtype=torch.complex128, requires_grad=True)
    factors = layer.factors("default")
    blocks_of_a, blocks_of_b = factors.A.view(3, 4, 3, 2), factors.B.view(3, 3, 2, 8)
    delta = torch.einsum("jnis,ijsm->imjn", blocks_of_a, blocks_of_b).reshape(24, 12)
    delta = layer.scaling["default"] * (delta + factors.B_general @ factors.A_general)
    dense = nn.functional.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
    results = []
    for y in (layer(x), dense):
        first = autograd.grad((y * y.abs()).sum().abs(), [x, *factors], create_graph=True)
        results.append((*first, *autograd.grad(sum(g.abs().square().sum() for g in first), [x, *factors])))
    torch.testing.assert_close(*results)
