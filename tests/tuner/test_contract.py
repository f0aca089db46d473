"""Every test of the contract that judges a layer fails for one that is wrong in just that."""

import copy
import inspect
import itertools

import pytest
import torch
from contract import LayerContract, assert_all_equal, assert_near, assert_rounded_once, layer_of
from torch import nn


class Spoiled(LayerContract):
    """Linear layers, each changed by `spoil`."""

    def __init__(self, spoil):
        self.spoil = spoil

    def make_base(self, dtype):
        return nn.Linear(12, 24, dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 5, 12, dtype=dtype)

    def output(self, base, x, weight):
        return nn.functional.linear(x, weight, base.bias.double())

    def adapt(self, *args, **changes):
        model = super().adapt(*args, **changes)
        self.spoil(layer_of(model))
        return model


def replaced(name, make):
    """Return a change of a layer: its method `name` becomes `make(layer, original)`."""
    return lambda layer: setattr(layer, name, make(layer, getattr(layer, name, None)))


def with_output(change):
    """Return a change of a layer: its output becomes `change(layer, output)`."""
    return lambda layer: layer.register_forward_hook(lambda module, args, y: change(module, y))


def blocks_swapped_in_gradients_alone(layer):
    holder = layer.gralora_B._modules["default"]
    holder.register_forward_hook(lambda module, args, f: f.flip(0) + (f - f.flip(0)).detach())


def finite_by_force(layer, original):
    def add_adapter(name, *args, **kwargs):
        original(name, *args, **kwargs)
        layer.gralora_B._modules[name].register_forward_hook(lambda module, args, factor: factor.nan_to_num(posinf=0))

    return add_adapter


def weight_moved_by_forward(layer):
    def move(module, args):
        module.base_layer.weight.data.add_(1)

    layer.register_forward_pre_hook(move)


def different_every_time():
    calls = itertools.count(1)
    return with_output(lambda layer, y: y * next(calls))


blocks_swapped = with_output(lambda layer, y: y.roll(12, -1))
never_unmerged = replaced("undo_merges", lambda layer, original: lambda *args: None)
WRONG = {
    "forward_is_that_of_the_dense_update": blocks_swapped,
    "gradients_are_those_of_the_dense_update": blocks_swapped_in_gradients_alone,
    "a_fresh_adapter_changes_nothing_exactly": with_output(lambda layer, y: y * (1 + 1e-6)),
    "half_precision_is_near_the_dense_update": blocks_swapped,
    "the_output_dtype_under_autocast_is_that_of_the_base": with_output(lambda layer, y: y.float()),
    "a_forward_and_backward_pass_changes_no_weight": weight_moved_by_forward,
    "modes_without_gradients_give_the_same_output": blocks_swapped,
    "the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed": replaced(
        "forward", lambda layer, original: lambda x: layer.base_layer(x).add_(original(x) - layer.base_layer(x))
    ),
    "one_dropout_draw_feeds_both_parts": blocks_swapped,
    "the_holders_of_the_factors_are_called": replaced("forward", lambda layer, original: layer.base_layer.forward),
    "adapter_names_are_refused_before_the_base_runs": replaced(
        "forward", lambda layer, original: lambda x, adapter_names: original(x)
    ),
    "gradient_checkpointing_gives_the_same_gradients": different_every_time(),
    "compiles_whole": with_output(lambda layer, y: y * 2 if torch.compiler.is_compiling() else y),
    "functional_call_under_vmap_gives_the_gradients_of_each_sample": different_every_time(),
    "active_adapters_add_up_switch_and_disable": with_output(lambda layer, y: y + len(layer.active_adapters) - 1),
    "deleting_an_adapter_leaves_nothing_of_it": replaced(
        "delete_adapter", lambda layer, original: lambda name: (original(name), layer.scaling.setdefault(name, 1.0))
    ),
    "scales_multiply_the_update": replaced("set_scale", lambda layer, original: lambda name, scale: None),
    "the_delta_weight_is_the_dense_update_as_stored": replaced(
        "get_delta_weight", lambda layer, original: lambda name: original(name).roll(12, 0)
    ),
    "merge_gives_the_outputs_of_the_adapter_and_unmerge_the_same_bits": never_unmerged,
    "a_merge_of_half_precision_factors_is_computed_in_float32": replaced(
        "get_delta_weight", lambda layer, original: lambda name: original(name).bfloat16()
    ),
    "several_merges_add_up_and_come_off": with_output(lambda layer, y: y * (1 + len(layer.merged_adapters))),
    "what_happens_to_the_adapter_while_it_is_merged_does_not_matter": with_output(
        lambda layer, y: y + layer.gralora_B["default"].sum()
    ),
    "a_safe_merge_refuses_what_is_not_finite_and_changes_nothing": replaced("add_adapter", finite_by_force),
    "a_conversion_while_merged_keeps_the_way_back": never_unmerged,
    "unload_gives_the_base_back": never_unmerged,
    "merge_and_unload_gives_a_module_of_the_base_s_type": replaced(
        "unload_and_optionally_merge_module", lambda layer, original: lambda **kwargs: nn.Sequential(original(**kwargs))
    ),
    "copies_are_whole_and_independent": replaced("__deepcopy__", lambda layer, original: lambda memo: layer),
    "the_state_dict_names_are_those_of_the_base_and_the_factors": lambda layer: layer.register_buffer(
        "extra", torch.zeros(1)
    ),
    "saving_and_loading_is_bit_for_bit": lambda layer: layer.scale_layer(2.0),
}
# These look at what happens before there is a layer, or at its type.
NOT_OF_A_LAYER = {
    "an_adapter_can_be_made_on_the_meta_device",
    "blocks_that_do_not_fit_are_refused_by_the_name_of_the_module",
    "the_layer_is_not_of_the_base_s_type",
}
ARGUMENTS = {
    "k": 2,
    "hybrid_r": 2,
    "dtype": torch.bfloat16,
    "mode": torch.no_grad,
    "merged": True,
    "through": copy.deepcopy,
    "low_cpu_mem_usage": False,
}


def test_every_test_of_the_contract_has_a_wrong_layer():
    tests = {name.removeprefix("test_") for name in dir(LayerContract) if name.startswith("test_")}
    assert tests == WRONG.keys() | NOT_OF_A_LAYER


@pytest.mark.usefixtures("one_thread", "unchecked_shapes")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_fails(name, tmp_path):
    def judge(spoil):
        test = getattr(Spoiled(spoil), f"test_{name}")
        known = ARGUMENTS | {"tmp_path": tmp_path}
        test(**{argument: known[argument] for argument in inspect.signature(test).parameters})

    judge(lambda layer: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        judge(WRONG[name])


def test_the_comparisons_fail_for_what_is_not_near():
    exact = torch.linspace(1, 2, 8, dtype=torch.float64)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        assert_near(exact, exact, dtype)
        with pytest.raises(AssertionError):
            assert_near(exact * (1 + error), exact, dtype)
    with pytest.raises(AssertionError):
        assert_near(exact.view(2, 4), exact, torch.float64)
    with pytest.raises(AssertionError):
        assert_near(exact * torch.nan, exact, torch.float64)
    with pytest.raises(AssertionError):
        assert_all_equal([exact], [exact.nextafter(2 * exact)])
    with pytest.raises(AssertionError):
        assert_rounded_once(exact.bfloat16().nextafter(torch.tensor(9.0).bfloat16()), exact)
