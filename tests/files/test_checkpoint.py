import pytest
import torch
from adapters import DAMAGES, adapted, lora, save_adapter

from gralora import to_lora
from gralora.files.checkpoint import folders_read, open_adapter
from gralora.tuner.blocks import Factors


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_adapter_gives_one_line_and_writes_nothing(damage, message, folder, tmp_path):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        to_lora(folder, tmp_path / "deep/lora")
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_model_without_a_gralora_adapter_is_refused():
    with pytest.raises(
        ValueError, match=r"adapter default of PeftModel.* must hold a GraLoRA adapter; .* peft_type='LORA'"
    ):
        open_adapter(lora())
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default'\]; got adapter_name='other'"):
        open_adapter(adapted(), "other")


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_the_header_says_what_the_tensors_are(hybrid_r, tmp_path):
    adapter = open_adapter(save_adapter(tmp_path / "adapter", hybrid_r=hybrid_r))
    for name, layer in adapter.layers.items():
        factors = adapter.factors(name)
        assert isinstance(factors, Factors)
        assert (layer.in_features, layer.out_features) == (factors.in_features, factors.out_features)
        assert layer.parameters == sum(factor.numel() for factor in factors if factor is not None)
        assert layer.rank == 2 * 8 + hybrid_r
        assert layer.scale == 16 / (8 + hybrid_r)
        assert layer.dtype == torch.float32
    assert adapter.largest == 32 * 48
    assert adapter.extras == ()


def test_a_folder_is_read_and_a_model_is_not(tmp_path):
    assert folders_read(str(tmp_path)) == (tmp_path,)
    assert folders_read(adapted()) == ()
