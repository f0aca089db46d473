import pytest
from adapters import edit_config, lora, save_adapter, save_original

from gralora.files.adapter_config import config_from, is_original, read_config, read_gralora_config, require_peft_type


def test_a_config_of_any_type_is_read(tmp_path):
    lora().save_pretrained(tmp_path / "lora")
    assert read_config(str(tmp_path / "lora"))["peft_type"] == "LORA"
    assert read_gralora_config(save_adapter(tmp_path / "adapter"))["gralora_k"] == 2


def test_the_type_is_checked(tmp_path):
    lora().save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"'.*lora' must hold a GraLoRA adapter; its config says peft_type='LORA'\."):
        read_gralora_config(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"'here' must hold a LoRA adapter; its config says peft_type='GRALORA'\."):
        require_peft_type({"peft_type": "GRALORA"}, "LORA", "here")
    with pytest.raises(ValueError, match=r"its config says peft_type=None\."):
        require_peft_type({}, "LORA", "here")


def test_the_type_in_memory_is_an_enum():
    require_peft_type(lora().peft_config["default"].to_dict(), "LORA", "here")


def test_the_format_of_the_authors_repository_is_told_apart(tmp_path):
    folder, _ = save_original(tmp_path / "original")
    assert is_original(read_config(folder))
    with pytest.raises(ValueError, match=r"was written by the authors' repository\. .*: gralora import .*original OUT"):
        read_gralora_config(folder)


def test_fields_of_newer_versions_are_left_out_and_bad_values_are_not(tmp_path):
    folder = save_adapter(tmp_path / "adapter")
    edit_config(folder, '"r": 8', '"r": 8, "invented_later": true')
    assert config_from(read_config(folder), folder).r == 8
    with pytest.raises(ValueError, match=r"The config of '.*adapter' cannot be used: `r` must be a positive integer"):
        config_from({"r": -1}, folder)
