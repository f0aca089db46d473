import threading

import pytest
import torch
from conftest import MLP, mlp_config
from torch import nn

from gralora import get_peft_model
from gralora.tuner.numerics import pinned_numerics

BACKENDS = ("cuda", "mkldnn")
LEVELS = [("generic", "all"), *((backend, operation) for backend in BACKENDS for operation in ("all", "matmul"))]


def precisions():
    return {level: torch._C._get_fp32_precision_getter(*level) for level in LEVELS}


@pytest.fixture(autouse=True)
def restored():
    yield
    for level in LEVELS:
        torch._C._set_fp32_precision_setter(*level, "none")
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)


SETTINGS = {
    "all, the way transformers does": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "one backend": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "one operation": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "one operation on CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "the old switch": lambda: torch.set_float32_matmul_precision("medium"),
    "the older switch": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("choose", SETTINGS.values(), ids=SETTINGS)
def test_precision_is_full_inside_and_restored_after(choose):
    choose()
    before = precisions()
    with pinned_numerics():
        assert all(torch._C._get_fp32_precision_getter(b, "matmul") in ("none", "ieee") for b in BACKENDS)
    assert precisions() == before
    # Inherited settings still are inherited: a later change of all backends has the same effect as before.
    torch.backends.fp32_precision = "none"
    inherited = precisions()
    choose()
    with pinned_numerics():
        pass
    torch.backends.fp32_precision = "none"
    assert precisions() == inherited


@pytest.mark.parametrize("choose", SETTINGS.values(), ids=SETTINGS)
def test_merges_under_every_precision_setting(choose):
    model = get_peft_model(MLP(torch.bfloat16), mlp_config())
    exact = model.base_model.model.up.base_layer.weight.float() + model.base_model.model.up.get_delta_weight("default")
    choose()
    model.merge_adapter()
    assert torch.equal(model.base_model.model.up.base_layer.weight, exact.bfloat16())
    model.unmerge_adapter()


def test_threads_that_merge_take_turns():
    torch.backends.fp32_precision = "tf32"
    before, inside, together = precisions(), [], []

    def compute():
        for _ in range(50):
            with pinned_numerics(threads=1):
                inside.append(1)
                together.append(len(inside))
                inside.pop()

    workers = [threading.Thread(target=compute) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(together) == {1}
    assert precisions() == before


@pytest.mark.parametrize("flushed", ["merge", "unmerge"])
def test_denormals_are_kept_and_the_setting_is_restored(flushed):
    holder = nn.ModuleDict({"layer": nn.Linear(8, 8, bias=False)})
    with torch.no_grad():
        holder["layer"].weight.mul_(1e-39)
    model = get_peft_model(holder, mlp_config(r=4, gralora_k=2, target_modules=["layer"]))
    layer = model.base_model.model["layer"]
    layer.scaling["default"] = 1e-39
    before, exact = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("default").double()
    for verb in ("merge", "unmerge"):
        torch.set_flush_denormal(verb == flushed)
        getattr(model, f"{verb}_adapter")()
        assert (torch.full((), 1e-38) * 0.01).eq(0) == (verb == flushed)
        torch.set_flush_denormal(False)
        if verb == "merge":
            merged = layer.base_layer.weight.detach().double()
            torch.testing.assert_close(merged, before.double() + exact, atol=3e-45, rtol=0)
            assert not torch.equal(merged, before.double())
    assert torch.equal(layer.base_layer.weight, before)
