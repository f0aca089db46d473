import oracle
import pytest
import torch
from conftest import random_factors

from gralora.tuner import svd


@pytest.mark.parametrize(("k", "hybrid_r"), [(1, 0), (2, 0), (4, 0), (2, 3), (4, 5)])
def test_singular_values_are_those_of_the_dense_update(k, hybrid_r):
    f = random_factors(k=k, hybrid_r=hybrid_r)
    dense = oracle.dense(*f, 0.7)
    expected = torch.linalg.svdvals(dense)
    s = svd.singular_values(f, 0.7)
    torch.testing.assert_close(s[: len(expected)], expected[: len(s)], atol=1e-12, rtol=1e-12)
    assert svd.numerical_rank(s, f) == torch.linalg.matrix_rank(dense)


@pytest.mark.parametrize("rank", [1, 5, 8, 30])
@pytest.mark.parametrize(("k", "hybrid_r"), [(2, 0), (4, 3)])
def test_compression_is_the_optimum(k, hybrid_r, rank):
    f = random_factors(k=k, n=8, m=9, hybrid_r=hybrid_r)
    dense = oracle.dense(*f, 0.7)
    lora_a, lora_b, _ = svd.best_lora(f, 0.7, rank)
    tail = torch.linalg.svdvals(dense)[rank:]
    error = (lora_b @ lora_a - dense).norm() / dense.norm()
    assert float(error) == pytest.approx(float(tail.norm() / dense.norm()), abs=1e-6)
    if rank >= torch.linalg.matrix_rank(dense):
        torch.testing.assert_close(lora_b @ lora_a, dense, atol=1e-12, rtol=1e-12)


def test_hybrid_columns_inside_the_blocks_cost_no_accuracy():
    f = random_factors(k=1, s=3, n=10, m=10, hybrid_r=2)
    f = f._replace(A_general=f.A[0, :, :2].T.contiguous(), B_general=f.B[0, :2].T.contiguous())
    dense = oracle.dense(*f, 1.0)
    lora_a, lora_b, s = svd.best_lora(f, 1.0, 5)
    torch.testing.assert_close(lora_b @ lora_a, dense, atol=1e-12, rtol=1e-12)
    assert svd.numerical_rank(s, f) == 3
