import pytest
from adapters import save_adapter
from conftest import randomise, small_config, tiny_gpt2, tiny_llama
from mixtures import MODELS, save_mixture_and_adapter
from safetensors.torch import save_file
from torch import nn

from gralora import GraloraConfig, get_peft_model
from gralora.report import inspect


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def test_the_base_is_found_under_its_own_names_and_transposed(tmp_path):
    gpt2 = tiny_gpt2()
    weight = gpt2.transformer.h[0].attn.c_attn.weight.detach().double()
    gpt2.transformer.save_pretrained(tmp_path / "base")
    config = GraloraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    randomise(get_peft_model(gpt2, config)).save_pretrained(tmp_path / "adapter")
    first = inspect(tmp_path / "adapter", tmp_path / "base").layers[0]
    assert first.relative_norm == pytest.approx(first.norm / float(weight.norm()))


def test_a_sharded_base_is_read_and_another_model_is_not_mistaken(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").is_file()
    assert all(entry.relative_norm for entry in inspect(folder, tmp_path / "sharded").layers)
    tiny_llama(hidden_size=16, intermediate_size=20).save_pretrained(tmp_path / "other")
    assert not any(entry.relative_norm for entry in inspect(folder, tmp_path / "other").layers)


def test_a_base_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`base` must be the folder of a model; .* has no model.safetensors"):
        inspect(folder, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="must be the index of a model; it cannot be read"):
        inspect(folder, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_are_apart_in_the_files_are_found(name, tmp_path):
    targets = ["kv_b_proj"] if name == "deepseek_v3" else ["q_proj"]
    model = save_mixture_and_adapter(tmp_path, name, target_modules=targets)
    weights = dict(model.unload().named_parameters())
    for entry in inspect(tmp_path / "adapter", tmp_path / "base").layers:
        weight = weights[entry.target if entry.experts else f"{entry.target}.weight"]
        assert entry.relative_norm == pytest.approx(entry.norm / float(weight.detach().double().norm()))


def test_weights_of_convolutions_and_embeddings_are_found(tmp_path):
    model = nn.Sequential(nn.Embedding(13, 8), nn.Conv2d(4, 6, (3, 2)))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    tuned = get_peft_model(model, small_config(target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match="This adapter uses `layer_kinds`"):
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for entry, module in zip(inspect(tmp_path / "adapter", tmp_path / "base").layers, tuned.unload(), strict=True):
        assert entry.relative_norm == pytest.approx(entry.norm / float(module.weight.detach().double().norm()))
