import oracle
import pytest
import torch
from conftest import random_factors
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora.tuner import blocks
from gralora.tuner.blocks import Factors
from gralora.tuner.initialise import STARTS

shapes = st.tuples(
    st.integers(1, 8), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, 3])
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.lists(st.integers(0, 3), max_size=4))
def test_apply_is_the_double_loop(shape, lead):
    factors = random_factors(*shape)
    x = torch.randn(*lead, factors.in_features, dtype=torch.float64)
    torch.testing.assert_close(blocks.apply(x, factors, 0.7), oracle.apply(x, *factors, 0.7))


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_dense_is_the_double_loop(shape):
    factors = random_factors(*shape)
    torch.testing.assert_close(blocks.dense(factors, 0.7), oracle.dense(*factors, 0.7))


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_lora_factors_multiply_to_dense(shape):
    k, s, _, _, hybrid_r = shape
    factors = random_factors(*shape)
    lora_a, lora_b = blocks.lora_factors(factors)
    assert lora_a.shape[0] == lora_b.shape[1] == k * k * s + hybrid_r
    torch.testing.assert_close(0.7 * lora_b @ lora_a, oracle.dense(*factors, 0.7))


def test_a_wrong_block_order_would_be_seen():
    factors = random_factors(k=3)
    swapped = factors._replace(B=factors.B[[1, 0, 2]])
    x = torch.randn(7, factors.in_features, dtype=torch.float64)
    assert not torch.allclose(blocks.apply(x, swapped, 1.0), oracle.apply(x, *factors, 1.0))
    assert not torch.allclose(blocks.dense(swapped, 1.0), oracle.dense(*factors, 1.0))


def test_one_block_is_lora():
    factors = random_factors(k=1)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(blocks.apply(x, factors, 2.0), 2.0 * x @ factors.A[0] @ factors.B[0])


def test_rank_of_the_update_is_k_times_that_of_lora():
    delta = blocks.dense(random_factors(k=4, s=1, n=16, m=16, hybrid_r=2), 1.0)
    assert torch.linalg.matrix_rank(delta) == 4 * 4 + 2


def test_exchange_is_its_own_inverse():
    h = torch.randn(3, 5, 6)
    assert torch.equal(blocks.exchange(blocks.exchange(h)), h)
    assert not torch.equal(blocks.exchange(h), h)


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradcheck(k, hybrid_r):
    factors = random_factors(k, n=2, m=3, hybrid_r=hybrid_r)
    tensors = [t.requires_grad_() for t in factors if t is not None]
    x = torch.randn(4, factors.in_features, dtype=torch.float64, requires_grad=True)
    result = torch.randn(4, factors.out_features, dtype=torch.float64, requires_grad=True)

    def function(result, x, *tensors):
        return blocks.add(result, x, Factors(*tensors), 0.5)

    assert torch.autograd.gradcheck(function, (result, x, *tensors))


def test_add_leaves_its_inputs_alone():
    factors = random_factors(n=3, m=3, hybrid_r=2)
    result, x = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    before = result.clone(), x.clone(), *(t.clone() for t in factors)
    blocks.add(result, x, factors, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (result, x, *factors), strict=True))


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"must have 6 features .* got \(4, 5\)"):
        blocks.apply(torch.randn(4, 5, dtype=torch.float64), random_factors(n=3), 1.0)


@pytest.mark.parametrize(("identity", "bound_b"), [(True, 0.0), (False, 8**-0.5)])
def test_starting_values(identity, bound_b):
    factors = random_factors(k=2, s=4, n=50, m=40, hybrid_r=4)
    STARTS[identity](factors)
    bounds = [50**-0.5, bound_b, 100**-0.5, 0.0 if identity else 4**-0.5]
    for tensor, bound in zip(factors, bounds, strict=True):
        assert 0.9 * bound <= tensor.abs().max() <= bound
