import os

import pytest
import torch
from adapters import TOKENS, edit_tensors, run, save_base_and_adapter, truncated, tuned_base
from transformers import AutoModelForCausalLM


@pytest.fixture
def folders(tmp_path):
    return save_base_and_adapter(tmp_path)


@pytest.fixture
def merge(folders, capsys):
    return lambda *arguments: run(capsys, "merge", folders / "base", folders / "adapter", folders / "out", *arguments)


def test_a_plain_model_comes_out(folders, merge):
    status, out, _ = merge()
    assert status == 0
    plain = AutoModelForCausalLM.from_pretrained(folders / "out")
    # Each merged float32 weight is rounded once more than W and Δ apart.
    torch.testing.assert_close(plain(TOKENS).logits, tuned_base(folders)(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert "Merged 4 layers" in out
    assert "No tokenizer was found" in out
    assert " 3 layers read back: 0.00e+00" in out
    assert not [entry for entry in os.listdir(folders) if entry.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "must be 'auto', 'float32', 'bfloat16' or 'float16'; got --dtype 'int4'"),
        (["--weight", "1", "--weight", "2"], "must have one value for each adapter; got 2 for 1 adapters"),
        (["--requantize"], "needs a quantised base"),
        (["--adapter", "nowhere"], "must be the folder of an adapter; 'nowhere' has no adapter_config.json"),
    ],
)
def test_mistakes_are_named_and_write_nothing(folders, merge, arguments, message):
    status, _, err = merge(*arguments)
    assert status == 2
    assert message in err
    assert "merging" not in err
    assert not (folders / "out").exists()


def test_a_base_that_is_not_there_is_named(folders, capsys):
    status, _, err = run(capsys, "merge", "no-such-base", folders / "adapter", folders / "out")
    assert status == 2
    assert "BASE must be a whole model; 'no-such-base' cannot be read" in err
    assert len(err.strip().splitlines()) == 1


def test_an_output_that_exists_is_kept_unless_it_may_be_overwritten(folders, merge, capsys):
    (folders / "out").mkdir()
    (folders / "out/config.json").write_text("{}")
    assert "must not exist" in merge()[2]
    assert (folders / "out/config.json").read_text() == "{}"
    assert "must hold config.json and *.safetensors" in merge("--overwrite")[2]
    (folders / "out/model.safetensors").write_text("")
    assert merge("--overwrite")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(folders / "out")
    assert run(capsys, "merge", folders / "base", folders / "adapter", folders / "base", "--overwrite")[0] == 2


def test_a_non_finite_adapter_is_refused(folders, merge):
    def spoil(tensors):
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        return tensors

    edit_tensors(folders / "adapter", spoil)
    assert "must be finite" in merge()[2]
    assert not (folders / "out").exists()


def test_a_damaged_adapter_or_base_is_named(folders, merge):
    config, weights = folders / "base/config.json", folders / "base/model.safetensors"
    text, whole = config.read_text(), weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "error: BASE must be a whole model; '" in merge()[2]
    weights.write_bytes(whole)
    for old, new in (('"hidden_size": 64', '"hidden_size": "wide"'), ('_heads": 4', '_heads": 0')):
        config.write_text(text.replace(old, new))
        assert "error: BASE must be a whole model; '" in merge()[2]
    config.write_text(text)
    truncated(folders / "adapter")
    status, _, err = merge()
    assert status == 2
    assert "must be a whole safetensors file" in err
    assert not (folders / "out").exists()
