import os

import pytest
import torch
from adapters import TOKENS, WIDTHS, edit_tensors, run, save_base_and_adapter, truncated, tuned_base
from conftest import randomise, tiny_llama
from mixtures import MODELS, save_mixture_and_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gralora import GraloraConfig, get_peft_model


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
        (["--requantize", "--dtype", "bf16"], "--dtype must not be given with --requantize, which keeps the format"),
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


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_merged_into_the_layout_of_the_base(name, tmp_path, capsys):
    targets = ["kv_b_proj"] if name == "deepseek_v3" else ["q_proj"]
    model = save_mixture_and_adapter(tmp_path, name, target_modules=targets)
    status, out, _ = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert status == 0
    assert " 3 layers read back: 0.00e+00" in out
    written = [load_file(next((tmp_path / part).glob("*.safetensors"))) for part in ("base", "out")]
    assert {key: t.shape for key, t in written[0].items()} == {key: t.shape for key, t in written[1].items()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A merged float32 weight is rounded once more than W and Δ apart.
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_embedding_is_merged_and_untied(tmp_path, capsys):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, GraloraConfig(r=4, target_modules=["embed_tokens"]))).eval()
    with pytest.warns(UserWarning, match="This adapter uses `layer_kinds`"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A merged float32 weight is rounded once more than W and Δ apart.
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_a_merge_of_which_nothing_can_be_read_back_fails(folders, merge, monkeypatch):
    monkeypatch.setattr("gralora.export.merged_model.revert_weight_conversion", lambda model, tensors: {})
    status, _, err = merge()
    assert status != 0
    assert "Nothing was written: none of 'model.layers." in err
    assert not (folders / "out").exists()


def test_a_base_or_an_adapter_that_is_not_whole_is_refused(folders, merge):
    weights = load_file(folders / "base/model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folders / "base/model.safetensors", metadata={"format": "pt"})
    status, _, err = merge()
    assert status == 2
    assert "BASE must be complete; " in err
    assert "lacks 1 weight, which start at random: 'lm_head.weight'." in err
    weights["lm_head.weight"] = head[1:]
    save_file(weights, folders / "base/model.safetensors", metadata={"format": "pt"})
    assert "'lm_head.weight' has shape [63, 64], and the config says [64, 64]" in merge()[2]
    assert not (folders / "out").exists()


def test_an_adapter_of_another_base_is_refused(folders, merge):
    tiny_llama(num_hidden_layers=1, **WIDTHS).save_pretrained(folders / "base")
    status, _, err = merge()
    assert status == 2
    assert "must be an adapter of this base model; it holds tensors without a place in the model: '" in err
    assert not (folders / "out").exists()
