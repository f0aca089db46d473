import shutil

import pytest
import torch
from adapters import edit_config, save_adapter, save_original
from conftest import MLP
from peft import PeftModel
from safetensors.torch import load_file

from gralora import to_lora
from gralora.importing import import_original


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.fixture
def original(tmp_path):
    return save_original(tmp_path / "original")


def test_an_adapter_of_the_authors_repository_is_imported(original, tmp_path):
    folder, model = original
    imported = import_original(folder, tmp_path / "ours")
    config = imported.config
    assert [config[name] for name in ("r", "hybrid_r", "alpha", "gralora_k")] == [6, 2, 20, 3]
    torch.manual_seed(0)
    base = MLP()
    for name in ("up", "down"):
        getattr(base, name).load_state_dict(getattr(model, name).base.state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_importing_what_is_not_the_authors_is_refused(original, folder, tmp_path):
    with pytest.raises(ValueError, match="is a GraLoRA adapter in PEFT's format already; there is nothing to convert"):
        import_original(folder)
    edit_config(folder, '"GRALORA"', '"LOHA"')
    with pytest.raises(ValueError, match="must hold a LoRA or a GraLoRA adapter; its config says peft_type='LOHA'"):
        import_original(folder)
    edit_config(folder, '"LOHA"', '"LORA"')
    with pytest.raises(ValueError, match=r"is a LoRA adapter\. Convert it with `from_lora`"):
        import_original(folder)
    source, _ = original
    with pytest.raises(ValueError, match=r"was written by the authors' repository. .*: gralora import .* OUT"):
        to_lora(source)
    edit_config(source, '"hybrid_r": 2', '"hybrid_r": 8')
    with pytest.raises(ValueError, match="`r` must be above `hybrid_r`, which it includes; got r=8 with hybrid_r=8"):
        import_original(source, tmp_path / "out")
    edit_config(source, '"hybrid_r": 8', '"hybrid_r": 5')
    with pytest.raises(ValueError, match=r"original.*`gralora_A_general.weight` must fit|`gralora_A` must fit"):
        import_original(source, tmp_path / "out")
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        import_original(source)
