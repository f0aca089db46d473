import math

import oracle
import pytest
import torch
from adapters import LLAMA, save_adapter
from conftest import tiny_llama

from gralora import GraloraConfig, get_peft_model, to_lora
from gralora.files.checkpoint import open_adapter


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def test_max_rank_compresses_what_is_above_it(folder, tmp_path):
    export = to_lora(folder, tmp_path / "lora", max_rank=6)
    adapter = open_adapter(folder)
    lost = whole = 0.0
    for layer in export.layers:
        f = adapter.factors(layer.name)
        s = torch.linalg.svdvals(oracle.dense(*f, adapter.layers[layer.name].scale))
        optimum = float(s[6:].norm() / s.norm())
        assert layer.relative_error == pytest.approx(optimum, abs=1e-6)
        assert layer.measured.relative == pytest.approx(optimum, abs=1e-6)
        lost, whole = lost + float(s[6:].square().sum()), whole + float(s.square().sum())
    assert export.rank == 6
    assert export.relative_error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)


def test_max_rank_at_the_full_rank_copies(folder):
    exact, capped = to_lora(folder), to_lora(folder, max_rank=16)
    assert capped.relative_error == 0
    assert all(torch.equal(exact.tensors[key], capped.tensors[key]) for key in exact.tensors)


def test_max_error_finds_the_smallest_rank(folder):
    for per_layer in (False, True):
        export = to_lora(folder, max_error=0.3, per_layer=per_layer)
        below = to_lora(folder, max_rank=export.rank - 1)
        if per_layer:
            assert max(layer.relative_error for layer in export.layers) <= 0.3
            assert max(layer.relative_error for layer in below.layers) > 0.3
        else:
            assert export.relative_error <= 0.3 < below.relative_error
    assert to_lora(folder, max_error=0).relative_error < 1e-12


def test_a_fresh_adapter_compresses_to_nothing(tmp_path):
    model = get_peft_model(tiny_llama(), GraloraConfig(r=8, target_modules=LLAMA))
    export = to_lora(model, tmp_path / "lora", max_rank=2)
    assert export.relative_error == 0
    assert not any(tensor.any() for tensor in export.tensors.values())
