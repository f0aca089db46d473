"""An interrupted merge or unmerge is complete or has not happened, and the record agrees with the weight."""

import signal
import time

import pytest
import torch
from conftest import assert_same_bits, randomise, tiny_llama, weights_of
from interrupts import FILES, Interrupt, interrupted_at
from torch import nn

from gralora import GraloraConfig, GraloraLayer, get_peft_model
from gralora.tuner import numerics


class Pair(nn.Module):
    """Two adapted layers; `tied` is held elsewhere too."""

    def __init__(self):
        super().__init__()
        self.up, self.tied = nn.Linear(16, 24, dtype=torch.bfloat16), nn.Linear(24, 16, dtype=torch.bfloat16)
        self.twin = nn.Linear(24, 16, dtype=torch.bfloat16)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        return self.tied(torch.relu(self.up(x)))


def pair():
    config = GraloraConfig(r=4, target_modules=["up", "tied"], init_weights=False)
    return get_peft_model(Pair(), config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GraloraLayer)]


def check(model, originals, merged, settings):
    """Every layer is merged and says so, or is as it was and says so; and it can be unmerged."""
    for name, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            weight = layer.base_layer.weight
            expected = merged if layer.merged else originals
            assert torch.equal(weight, expected[f"{name}.base_layer.weight"]), name
    assert settings == precision()


def precision():
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_between_any_two_lines(verb, one_thread):
    model = pair()
    originals, settings = weights_of(model), precision()
    model.merge_adapter()
    merged = weights_of(model)
    if verb == "merge":
        model.unmerge_adapter()
    number = 1
    while interrupted_at(number, getattr(model, f"{verb}_adapter")):
        check(model, originals, merged, settings)
        depths = {layer.merged for layer in layers_of(model)}
        if verb == "merge":
            assert depths == {False}, f"line {number}"
        else:  # some layers, each whole: the next unmerge goes on
            if True in depths:
                model.unmerge_adapter()
            assert_same_bits(originals, weights_of(model))
            model.merge_adapter()
        number += 1
    assert number > 60
    assert {layer.merged for layer in layers_of(model)} == {verb == "merge"}
    if verb == "merge":
        model.unmerge_adapter()
    assert_same_bits(originals, weights_of(model))


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_between_any_two_lines_of_one_layer(verb, one_thread):
    layer = layers_of(pair())[0]
    original, number = layer.base_layer.weight.detach().clone(), 1
    while True:
        if verb == "unmerge" and not layer.merged:
            layer.merge()
        if not interrupted_at(number, getattr(layer, verb)):
            break
        assert verb == "unmerge" or not layer.merged
        assert layer.merged or torch.equal(layer.base_layer.weight, original)
        number += 1
    assert number > 40
    if layer.merged:
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)


def test_a_final_merge_says_which_layers_are_merged(one_thread):
    expected = None
    number = 1
    while True:
        torch.manual_seed(0)
        model = pair()
        originals, settings = weights_of(model), precision()
        if expected is None:
            model.base_model.merge_adapter(keep_base=False)
            expected = weights_of(model)
            continue
        if not interrupted_at(number, lambda model=model: model.base_model.merge_adapter(keep_base=False)):
            break
        check(model, originals, expected, settings)
        number += 7  # every line once in seven: a new model each time


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_timer_interrupts_at_500_moments(one_thread):
    """Real signals arrive between any two bytecodes, inside torch too."""
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    base = tiny_llama(tie_word_embeddings=True).bfloat16()
    model = randomise(get_peft_model(base, GraloraConfig(r=8, target_modules=targets)))
    originals, settings = weights_of(model), precision()
    model.merge_adapter()
    merged = weights_of(model)
    model.unmerge_adapter()
    stopped = {"merge": 0, "unmerge": 0}
    seconds = {verb: timed(getattr(model, f"{verb}_adapter")) for verb in ("merge", "unmerge")}

    armed = False

    def handler(number, frame):
        if armed:
            raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for number in range(500):
            verb = ("merge", "unmerge")[number % 2]
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, seconds[verb] * (number * 0.6180339887 % 1)))
                getattr(model, f"{verb}_adapter")()
                armed = False
            except Interrupt:
                armed = False
                stopped[verb] += 1
                # All, where the signal came when everything was done.
                assert verb == "unmerge" or len({layer.merged for layer in layers_of(model)}) == 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            check(model, originals, merged, settings)
            if verb == "merge" and not all(layer.merged for layer in layers_of(model)):
                model.merge_adapter()
            elif verb == "unmerge" and any(layer.merged for layer in layers_of(model)):
                model.unmerge_adapter()
                assert_same_bits(originals, weights_of(model))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert min(stopped.values()) > 50, stopped


def timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.mark.parametrize("choose", ["tf32", "bf16", "denormals"])
def test_an_interrupt_leaves_the_settings_as_they_were(choose, one_thread):
    def settings():
        flushed = bool((torch.full((), 1e-38) * 0.01) == 0)
        return flushed, torch.backends.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    layer = layers_of(pair())[0]
    try:
        if choose == "denormals":
            torch.set_flush_denormal(True)
        elif choose == "tf32":
            torch.backends.fp32_precision = "tf32"
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        before, number = settings(), 1
        # At any moment but while the settings themselves are set or put back.
        while interrupted_at(number, layer.merge, FILES - {numerics.__file__}):
            assert settings() == before, number
            number += 1
        assert number > 40
    finally:
        torch.set_flush_denormal(False)
        torch.backends.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
