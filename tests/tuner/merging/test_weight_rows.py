import pytest
import torch

from gralora.tuner.merging import rows
from gralora.tuner.merging.rows import digest, fingerprint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(4, 6), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_seen_and_every_pair_of_them(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    found = digest(weight)
    raw = weight.view(torch.uint8).view(-1)
    single = []
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            single.append(int(digest(weight) - found))
            raw[byte] ^= 1 << bit
    assert digest(weight) == found
    assert 0 not in single
    # The digest is linear in the words, so two flips in different words change it by the sum of their changes.
    assert len(set(single)) == len({abs(change) for change in single}) == len(single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_flips_and_exchanges_do_not_cancel(dtype):
    weight = torch.randn(8, 8).to(dtype)
    found = digest(weight)
    for at_rows, columns in [([0, 2], [0, 2]), ([1, 3], [1, 3]), ([0, 0, 2, 2], [0, 4, 0, 4]), ([5, 5], [1, 3])]:
        changed = weight.clone()
        changed[at_rows, columns] *= -1
        assert digest(changed) != found
    assert digest(weight.flip(0)) != found
    assert digest(weight.T) != found
    assert digest(torch.zeros(2, 2)) != digest(-torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_layout_does_not_matter(dtype):
    weight = torch.randn(7, 5).to(dtype)
    buffer = torch.zeros(1 + weight.numel(), dtype=dtype)
    buffer[1:] = weight.view(-1)
    assert digest(buffer[1:].view(7, 5)) == digest(weight) == digest(weight.T.contiguous().T)


def test_the_fingerprint_of_a_matrix_goes_by_chunks(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 10)
    weight = torch.randn(5, 5)
    assert fingerprint(weight) == tuple(int(digest(weight[a:b])) for a, b in [(0, 2), (2, 4), (4, 5)])
    assert fingerprint(weight[:0]) == ()
