"""Updates of rows by the factors of their experts, in every way that they are computed, against dense products."""

import oracle
import pytest
import torch

from gralora.tuner import grouped
from gralora.tuner.blocks import Factors
from gralora.tuner.grouped import Routing, add_update, product

EXPERTS, TOP_K, IN, OUT = 4, 2, 12, 8


def even(tokens):
    """Routing in which the experts of a token follow each other."""
    first = torch.arange(tokens) % EXPERTS
    return torch.stack([first, (first + 1) % EXPERTS], 1)


def all_to_two(tokens):
    """Routing in which the same two of many experts get everything."""
    return torch.tensor([[1, 3]]).repeat(tokens, 1)


# Name: tokens, routing, number of experts, (batches, has_few_rows, is_even)
WAYS = {
    "padded to even numbers": (9, even, EXPERTS, (True, True, True)),
    "batched, weights by group": (9, all_to_two, 6, (True, True, False)),
    "batched, many rows": (80, even, EXPERTS, (True, False, False)),
    "by group": (9, all_to_two, 20, (False, False, False)),
}


@pytest.fixture(params=WAYS, name="way")
def routed(request):
    tokens, route, experts, flags = WAYS[request.param]
    routing = Routing(route(tokens), experts)
    assert (routing.batches, routing.has_few_rows, routing.is_even) == flags
    return route(tokens), experts, routing


def random_stack(experts, k=2, r=4, hybrid_r=0, dtype=torch.float64):
    torch.manual_seed(0)
    hybrid = [torch.randn(experts, hybrid_r, IN), torch.randn(experts, OUT, hybrid_r)] if hybrid_r else []
    tensors = [torch.randn(experts, k, IN // k, r), torch.randn(experts, k, r, OUT // k), *hybrid]
    return Factors(*(tensor.to(dtype).requires_grad_() for tensor in tensors))


def by_pair(x, index, factors, scale):
    """The updates of every token by each of its experts, `[t, top_k, out]`, by the oracle."""
    return torch.stack(
        [
            torch.stack([oracle.apply(row, *_expert(factors, expert), scale) for expert in experts])
            for row, experts in zip(x, index.tolist(), strict=True)
        ]
    )


def _expert(factors, expert):
    return [None if factor is None else factor[expert] for factor in factors]


@pytest.mark.parametrize("from_tokens", [True, False])
@pytest.mark.parametrize(("k", "hybrid_r"), [(1, 0), (2, 0), (4, 3)])
def test_updates_and_their_gradients_are_those_of_the_oracle(way, k, hybrid_r, from_tokens):
    index, experts, routing = way
    factors = random_stack(experts, k, 4, hybrid_r)
    x = torch.randn(len(index), IN, dtype=torch.float64, requires_grad=True)
    rows, given = x[routing.tokens], [factor for factor in factors if factor is not None]
    start = torch.zeros(len(rows), OUT, dtype=torch.float64)
    found = routing.by_token(add_update(start, rows, x if from_tokens else None, factors, 0.5, torch.float64, routing))
    expected = by_pair(x, index, factors, 0.5)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, *given), g), torch.autograd.grad(expected, (x, *given), g), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_second_derivatives(way):
    index, experts, routing = way
    index, routing = index[:5], Routing(index[:5], experts)
    factors = random_stack(experts, r=2)
    x = torch.randn(len(index), IN, dtype=torch.float64, requires_grad=True)

    def update(x, A, B):
        start = x.new_zeros(len(routing.tokens), OUT)
        y = add_update(start, x[routing.tokens], x, Factors(A, B), 0.5, torch.float64, routing)
        return routing.by_token(y)

    assert torch.autograd.gradcheck(update, (x, factors.A, factors.B))
    if routing.batches:  # transformers' own fallback for float64 has no second derivative
        assert torch.autograd.gradgradcheck(update, (x, factors.A, factors.B))


def test_products_with_frozen_weights(way):
    index, experts, routing = way
    weights, x = torch.randn(experts, IN, OUT), torch.randn(len(index), IN)
    found = routing.by_token(product(x[routing.tokens], weights, routing))
    torch.testing.assert_close(found, torch.einsum("ti,tkio->tko", x, weights[index]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(way, dtype):
    index, experts, routing = way
    factors = random_stack(experts, dtype=torch.float32)
    x = torch.randn(len(index), IN, dtype=dtype)
    compute = torch.float32 if dtype == torch.float16 else dtype
    y = add_update(x.new_zeros(len(routing.tokens), OUT), x[routing.tokens], x, factors, 0.5, compute, routing)
    expected = by_pair(x.double(), index, [None if f is None else f.double() for f in factors], 0.5)
    found = routing.by_token(y)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < torch.finfo(dtype).eps * 2 * expected.norm()
    found.sum().backward()
    assert factors.A.grad.dtype == torch.float32


def test_only_the_tokens_and_the_middle_are_kept_for_the_backward_pass():
    index = even(64)
    routing, factors = Routing(index, EXPERTS), random_stack(EXPERTS, dtype=torch.float32)
    x, sizes = torch.randn(len(index), IN, requires_grad=True), []
    rows = x.detach()[routing.tokens]

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        add_update(rows.new_zeros(len(rows), OUT), rows, x, factors, 0.5, torch.float32, routing)
    middle = EXPERTS * routing.most * 2 * 4  # experts, rows, k, r
    assert sorted(sizes) == sorted([x.numel(), factors.A.numel(), factors.B.numel(), middle])


def test_a_stride_that_torch_s_product_refuses_is_taken_another_way():
    index, x = all_to_two(9), torch.randn(9, IN, dtype=torch.bfloat16)
    routing, weights = Routing(index, 20), torch.randn(20, IN, 5, dtype=torch.bfloat16)
    assert not grouped._is_aligned(weights)
    found = routing.by_token(product(x[routing.tokens], weights, routing))
    torch.testing.assert_close(found, torch.einsum("ti,tkio->tko", x, weights[index]), rtol=0.02, atol=0.02)


def test_no_tokens():
    routing, factors = Routing(torch.zeros(0, TOP_K, dtype=torch.int64), EXPERTS), random_stack(EXPERTS)
    x = torch.zeros(0, IN, dtype=torch.float64)
    y = add_update(torch.zeros(0, OUT, dtype=torch.float64), x, x, factors, 1.0, torch.float64, routing)
    assert routing.by_token(y).shape == (0, TOP_K, OUT)
