import pytest
from adapters import save_adapter
from conftest import randomise, tiny_gpt2, tiny_llama

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
