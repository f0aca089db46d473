import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import Recorder, adapter_bytes, interrupt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gralora import from_lora
from gralora.recipe.options import TrainingOptions
from gralora.recipe.run_folder import write_json
from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")
# The shape of the adapter comes from the folder.
SHAPE = {"r": None, "dropout": None}


def test_a_new_run_goes_on_from_an_adapter(options, unbroken, tmp_path):
    """The rate is so small that the values stay where they were."""
    result = train(options(**SHAPE, start_from=unbroken[0].output, lr=1e-12, steps=1))
    old, new = (load_file(f"{folder}/adapter_model.safetensors") for folder in (unbroken[0].output, result.output))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=1e-10)
    assert result.losses[0] < unbroken[0].losses[0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["gralora_k"], config["gralora_dropout"]) == (4, 2, 0.3)


def test_an_imported_lora_adapter_is_trained_further(options, base_model, tmp_path):
    torch.manual_seed(3)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_model),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    lora.save_pretrained(tmp_path / "lora")
    from_lora(tmp_path / "lora", tmp_path / "imported", k=2)
    ids = torch.tensor([[5, 6, 7]])
    expected = lora.eval()(ids).logits
    train(options(**SHAPE, start_from=str(tmp_path / "imported"), lr=1e-12, steps=1))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), tmp_path / "out")
    torch.testing.assert_close(tuned.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_base_model_is_that_of_the_adapter(options, unbroken, base_model, tmp_path):
    assert TrainingOptions(start_from=unbroken[0].output).model == base_model
    assert TrainingOptions(start_from=unbroken[0].output, model="other").model == "other"
    (tmp_path / "nameless").mkdir()
    config = json.loads(Path(unbroken[0].output, "adapter_config.json").read_text())
    write_json(tmp_path / "nameless" / "adapter_config.json", config | {"base_model_name_or_path": None})
    with pytest.raises(ValueError, match=r"`model` must be given: the adapter in .* names no base model"):
        TrainingOptions(start_from=str(tmp_path / "nameless"))


def test_an_adapter_of_another_method_is_refused(options, base_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_model)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is a LoRA"):
        train(options(**SHAPE, start_from=str(tmp_path / "lora")))
    assert not (tmp_path / "out").exists()


def test_such_a_run_is_resumed(options, unbroken, tmp_path):
    settings = {**SHAPE, "start_from": unbroken[0].output}
    whole = train(options(output=str(tmp_path / "whole"), **settings))
    train(options(**settings), Recorder(3, interrupt))
    assert resume_run(str(tmp_path / "out")).losses == whole.losses
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_an_adapter_that_does_not_fit_is_refused(options, unbroken, tmp_path, change):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((tmp_path / unbroken[0].output / "adapter_config.json").read_bytes())
    tensors = load_file(f"{unbroken[0].output}/adapter_model.safetensors")
    name = next(iter(tensors))
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[name.replace("layers.0", "layers.9")] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="must be an adapter of this base model"):
        train(options(**SHAPE, start_from=str(folder)))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_is_refused(options, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`start_from` must be the folder of an adapter; '.*nothing-here' has no"
    ):
        train(options(**SHAPE, model="not-reached", start_from=str(tmp_path / "nothing-here")))


def test_a_lora_is_refused_with_the_way_out(options, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"is a LoRA\. Convert it first: gralora import .* OUTPUT"):
        train(options(**SHAPE, model="not-reached", start_from=str(tmp_path)))
