import copy
import pickle

import pytest
import torch
from conftest import adapted_layer, assert_same_bits, layer_settings, randomise, tiny_llama, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gralora import GraloraConfig, GraloraLayer, get_peft_model
from gralora.tuner.merging import merge as merging
from gralora.tuner.merging import records, rows
from gralora.tuner.merging.sharing import UNSHARED

HALF = [torch.bfloat16, torch.float16]


def make_layer(n_in=64, n_out=48, dtype=torch.bfloat16, k=4, r=8, q=0, ratio=0.1):
    """A layer whose update is `ratio` times as large as its weight, by mean absolute value."""
    layer = adapted_layer(nn.Linear(n_in, n_out, bias=False, dtype=dtype), r=r, gralora_k=k, hybrid_r=q)
    change = layer.base_layer.weight.detach().float().abs().mean() / layer.get_delta_weight("default").abs().mean()
    layer.scaling["default"] *= ratio * change.item()
    return layer


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.float64, *HALF]),
    st.floats(1e-4, 1e3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 3]),
    st.integers(1, 40),
)
def test_unmerge_restores_the_bits_for_any_size_of_update(dtype, ratio, k, q, chunk):
    layer = make_layer(dtype=dtype, ratio=ratio, k=k, q=q)
    before = layer.base_layer.weight.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK", chunk * 64)
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_special_values_are_restored(dtype):
    layer = make_layer(dtype=dtype)
    info = torch.finfo(dtype)
    with torch.no_grad():
        odd = [0.0, -0.0, info.tiny, info.smallest_normal / 2, info.max, -info.max, float("inf"), float("nan")]
        layer.base_layer.weight[0, :8] = torch.tensor(odd, dtype=dtype)
    bits = layer.base_layer.weight.detach().clone().view(torch.int8)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight.detach().view(torch.int8), bits)


@pytest.mark.parametrize("between", ["threads", "precision", "autocast", "adapter", "scale", "delete"])
def test_unmerge_does_not_depend_on_changes_since_the_merge(between):
    layer = make_layer(256, 192, ratio=0.1, r=32)
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert isinstance(layer._merges[0], records.DenseRecord)
    threads = torch.get_num_threads()
    try:
        if between == "threads":
            torch.set_num_threads(1)
        elif between == "precision":
            torch.set_float32_matmul_precision("medium")
        elif between == "adapter":
            layer.gralora_A["default"].data.normal_()
            layer.gralora_B["default"] = torch.zeros(1)
        elif between == "scale":
            layer.scaling["default"] = 0.0
        elif between == "delete":
            with pytest.warns(UserWarning, match="unmerging it before"):
                layer.delete_adapter("default")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=between == "autocast"):
            if layer.merged:
                layer.unmerge()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
@pytest.mark.parametrize("size", [64, 16])  # large factors are kept rounded
def test_adapters_of_different_dtypes_merge_exactly_and_come_off(dtypes, size):
    layer = adapted_layer(nn.Linear(size, size, bias=False))
    for name, dtype in zip("ab", dtypes, strict=True):
        layer.add_adapter(name, layer_settings(r=2))
        for factor in ("gralora_A", "gralora_B"):
            getattr(layer, factor)[name] = getattr(layer, factor)[name].to(dtype)
    layer.set_adapter(["a", "b"])
    before = layer.base_layer.weight.detach().clone()
    exact = before.double() + sum(layer.get_delta_weight(name).double() for name in "ab")
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.double(), exact, atol=1e-7, rtol=1e-6)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_weight_in_the_middle_of_a_buffer_merges(dtype):
    layer = make_layer(64, 64, dtype=dtype)
    buffer = torch.randn(1 + 64 * 64).to(dtype)
    before = buffer.clone()
    layer.base_layer.weight.data = buffer[1:].view(64, 64)
    layer.note_sharing(UNSHARED, model := nn.ModuleDict({"layer": layer}))  # in which nobody else holds the buffer
    assert model["layer"] is layer
    layer.merge()
    assert not torch.equal(buffer, before)
    layer.unmerge()
    assert torch.equal(buffer, before)


@pytest.mark.parametrize(("ratio", "share"), [(0.003, 0.08), (0.01, 0.12), (0.03, 0.25)])
@pytest.mark.parametrize("dtype", HALF)
def test_the_merge_record_is_small(dtype, ratio, share):
    layer = make_layer(1024, 1024, dtype=dtype, ratio=ratio, r=32, k=2)
    layer.merge()
    record = layer._merges[0]
    allowed = {torch.bfloat16: share, torch.float16: 1.0}[dtype]  # three more bits in half as many: little rounds away
    assert 0 < record.nbytes <= allowed * layer.base_layer.weight.nbytes


def test_the_merge_record_is_no_larger_than_the_weight_and_unmerge_drops_it():
    layer = make_layer(64, 64, ratio=5.0)
    layer.merge()
    record = layer._merges[0]
    assert record.nbytes <= layer.base_layer.weight.nbytes
    layer.unmerge()
    assert not layer._merges


def test_the_merge_record_is_not_in_the_state_dict(tmp_path):
    layer = make_layer()
    names = layer.state_dict().keys()
    layer.merge()
    assert layer.state_dict().keys() == names


def test_a_weight_changed_while_merged_is_not_restored_to_something_else():
    layer = make_layer()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.weight[3, 3] += 1
    with pytest.raises(RuntimeError, match="cannot be undone: the base weight was changed while it was merged"):
        layer.unmerge()
    assert layer.merged


def test_keep_base_false_is_final():
    layer = make_layer()
    layer.merge(keep_base=False)
    assert layer._merges[0].nbytes == 0
    with pytest.raises(RuntimeError, match="made with `keep_base=False`"):
        layer.unmerge()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_of_a_twice_merged_layer_can_be_unmerged(through):
    layer = make_layer(ratio=0.03)
    layer.add_adapter("second", layer_settings(hybrid_r=1))
    before = layer.base_layer.weight.detach().clone()
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["second"])
    twin = through(layer)
    assert torch.equal(twin.base_layer.weight, layer.base_layer.weight)
    assert twin.merged_adapters == ["default", "second"]
    for one in (twin, layer):
        one.unmerge()
        assert torch.equal(one.base_layer.weight, before)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_at_any_layer_happens_in_none(monkeypatch, failing, error, verb):
    targets = ["q_proj", "v_proj", "down_proj"]
    model = randomise(get_peft_model(tiny_llama().bfloat16(), GraloraConfig(r=8, target_modules=targets)))
    before, tree = weights_of(model), {name: id(m) for name, m in model.named_modules()}
    names = [name for name, m in model.base_model.model.named_modules() if isinstance(m, GraloraLayer)]
    original, seen = merging.prepare, []

    def merge(layer, *args, **kwargs):
        seen.append(layer)
        if len(seen) == failing + 1:
            raise error
        return original(layer, *args, **kwargs)

    monkeypatch.setattr(merging, "prepare", merge)
    with pytest.raises(type(error)) as raised:
        getattr(model, verb)()
    assert names[failing] in str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert_same_bits(before, weights_of(model))
    assert {name: id(m) for name, m in model.named_modules()} == tree
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, GraloraLayer))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature", "ignore:1 adapted layers cannot be merged")
def test_the_delta_of_a_complex_layer_keeps_its_imaginary_part():
    base = nn.Sequential(nn.Linear(8, 6, dtype=torch.complex64))
    layer = get_peft_model(base, GraloraConfig(r=4, target_modules=["0"], init_weights=False)).base_model.model[0]
    x = torch.randn(3, 8, dtype=torch.complex64)
    torch.testing.assert_close(layer.base_layer(x) + x @ layer.get_delta_weight("default").T, layer(x))
