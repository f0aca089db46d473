"""Merging into stacks of experts: one after the other, all of them or none."""

import copy

import pytest
import torch
from conftest import assert_same_bits, weights_of
from interrupts import interrupted_at
from test_interrupts import precision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.merging.records import CopyRecord, DenseRecord
from gralora.tuner.merging.stack import StackRecord

EXPERTS, OUT, IN = 5, 12, 24


class Experts(nn.Module):
    """A stack of experts that a module elsewhere may hold too."""

    def __init__(self, dtype=torch.bfloat16, out=OUT, size=IN):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, out, size, dtype=dtype))

    def forward(self, x):
        return (self.weight @ x.unsqueeze(-1)).squeeze(-1)


def adapted(tied=False, **changes):
    model = nn.Module()
    model.experts = Experts(**changes)
    if tied:
        model.twin = Experts(**changes)
        model.twin.weight = model.experts.weight
    settings = {"r": 4, "target_modules": [], "target_parameters": ["experts.weight"], "init_weights": False}
    model = get_peft_model(model, GraloraConfig(**settings))
    return model, model.base_model.model.experts


def merged_stack(layer):
    """The exact sum, rounded once."""
    return (layer.weight_ref().parameter.double() + layer.get_delta_weight("default").double()).float().bfloat16()


def test_no_tensor_of_the_size_of_the_stack_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
            views = func in (torch.ops.aten.view.default, torch.ops.aten.detach.default, torch.ops.aten.view.dtype)
            if not views:
                self.elements = max(self.elements, *(t.numel() for t in made), 0)
            return result

    model, layer = adapted(out=48, size=64)
    before, expected = weights_of(model), merged_stack(layer)
    with Largest() as largest:
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight_ref().parameter, expected)
    with Largest() as undone:
        model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
    one_expert, factors = 48 * 64, EXPERTS * 4 * 64
    assert max(largest.elements, undone.elements) <= max(one_expert, factors) < EXPERTS * one_expert


def test_the_way_back_is_smaller_than_the_stack():
    layer = adapted(out=96, size=128)[1]
    for factors in (layer.gralora_A, layer.gralora_B):
        factors["default"] = 0.1 * factors["default"].detach()
    layer.merge()
    record = layer._merges[0]
    assert isinstance(record, StackRecord)
    assert {type(one) for one in record.experts} == {DenseRecord}
    assert record.nbytes < 0.4 * layer.weight_ref().parameter.nbytes


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_between_any_two_lines(verb, one_thread):
    model, layer = adapted()
    original, merged, number = layer.weight_ref().parameter.detach().clone(), merged_stack(layer), 1
    settings = precision()
    while True:
        if verb == "unmerge" and not layer.merged:
            model.merge_adapter()
        if not interrupted_at(number, getattr(model, f"{verb}_adapter")):
            break
        assert verb == "unmerge" or not layer.merged
        assert torch.equal(layer.weight_ref().parameter, merged if layer.merged else original), number
        assert precision() == settings, number
        number += 1
    assert number > 300
    if layer.merged:
        model.unmerge_adapter()
    assert torch.equal(layer.weight_ref().parameter, original)


def test_a_final_merge_that_is_interrupted_is_undone(one_thread):
    _, layer = adapted()
    original, merged, number = layer.weight_ref().parameter.detach().clone(), merged_stack(layer), 1
    settings = precision()
    while interrupted_at(number, lambda: layer.merge(keep_base=False)):
        assert precision() == settings, number
        assert torch.equal(layer.weight_ref().parameter, merged if layer.merged else original), number
        if layer.merged:  # the last lines
            break
        number += 5
    assert number > 200


@pytest.mark.parametrize("keep_base", [True, False])
def test_an_expert_that_is_not_finite_leaves_no_expert_merged(keep_base):
    model, layer = adapted()
    before = weights_of(model)
    with torch.no_grad():
        layer.gralora_B["default"][3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="merged weight must be finite"):
        layer.merge(safe_merge=True, keep_base=keep_base)
    assert not layer.merged
    assert_same_bits(before, weights_of(model))


def test_an_expert_that_was_changed_is_seen_before_any_other_is_restored():
    model, layer = adapted()
    model.merge_adapter()
    with torch.no_grad():
        layer.weight_ref().parameter[3, 0, 0] += 1
    changed = weights_of(model)
    with pytest.raises(RuntimeError, match="changed while it was merged"):
        model.unmerge_adapter()
    assert_same_bits(changed, weights_of(model))
    assert layer.merged


@pytest.mark.parametrize("own_weights", [False, True])
def test_a_stack_that_others_hold_is_not_changed(own_weights):
    model, layer = adapted(tied=not own_weights)
    shared, expected = layer.weight_ref().parameter, merged_stack(layer)
    before = shared.detach().clone()
    for _ in range(2):
        model.base_model.merge_adapter(own_weights=own_weights)
        assert layer.weight_ref().parameter is not shared
        assert torch.equal(shared, before)
        assert torch.equal(layer.weight_ref().parameter, expected)
        model.unmerge_adapter()
        assert layer.weight_ref().parameter is shared


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_several_merges_come_off_in_one_undo_and_after_an_interrupt(one_thread):
    model, layer = adapted()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    original, number, settings = layer.weight_ref().parameter.detach().clone(), 1, precision()
    while True:
        for name in ("default", "second"):
            if name not in layer.merged_adapters:
                layer.merge(adapter_names=[name])
        if not interrupted_at(number, layer.unmerge):
            break
        assert precision() == settings, number
        assert layer.merged_adapters in ([], ["default", "second"])
        if layer.merged:
            layer.unmerge()
        assert torch.equal(layer.weight_ref().parameter, original), number
        number += 11
    assert number > 300


def test_records_of_large_updates_are_copies_of_the_experts():
    layer = adapted()[1]
    for factors in (layer.gralora_A, layer.gralora_B):
        factors["default"] = 100 * factors["default"].detach()
    original = layer.weight_ref().parameter.detach().clone()
    layer.merge()
    assert {type(one) for one in layer._merges[0].experts} == {CopyRecord}
    layer.unmerge()
    assert torch.equal(layer.weight_ref().parameter, original)
