import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import randomise, tiny_llama
from peft import LoraConfig
from peft import get_peft_model as get_any_peft_model
from safetensors.torch import load_file, save_file
from tiny_language_model import make_tokenizer, save_model

from gralora import GraloraConfig, get_peft_model
from gralora.recipe.answering.answer import GenerationOptions, answering, generate
from gralora.tuner.layer import gralora_layers

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(adapter, tmp_path, monkeypatch):
    """A copy of a trained adapter; the base model must not be loaded."""
    monkeypatch.setattr("gralora.pretrained.load", None)
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer; got max_new_tokens=0"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be a positive integer; got max_new_tokens=True"),
        ({"temperature": float("nan")}, "`temperature` must be zero or a finite positive number"),
        ({"temperature": "hot"}, "got temperature='hot'"),
        ({"top_p": 0.0, "temperature": 1}, "`top_p` must be a number above 0 and up to 1; got top_p=0.0"),
        ({"top_p": 0.5}, "`top_p` must come with a `temperature` above 0"),
        ({"top_k": 0, "temperature": 1}, "`top_k` must be a positive integer; got top_k=0"),
        ({"top_k": 1}, "`top_k` must come with a `temperature` above 0"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
        ({"threads": 0}, "`threads` must be a positive integer"),
        ({"load_in": "2bit"}, "`load_in` must be '4bit' or '8bit'"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 4294967295; got seed=-1"),
        ({"seed": 2**32}, "`seed` must be an integer from 0 to 4294967295"),
        ({"dtype": "int8"}, "`dtype` must be 'auto', 'float32'"),
    ],
)
def test_a_wrong_generation_option_is_said(changes, message):
    with pytest.raises(ValueError, match="must") as error:
        GenerationOptions(adapter="folder", **changes)
    assert message in str(error.value)


def test_an_adapter_that_names_no_base_model_needs_one(folder):
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="`model` must be given"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


def test_an_adapter_in_the_format_of_the_authors_is_refused(folder):
    change_config(folder, gralora_alpha=64)
    with pytest.raises(ValueError, match="was written by the authors' repository"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


def test_an_adapter_that_is_not_finite_is_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="must be finite"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


def test_an_adapter_of_no_method_is_refused(folder):
    change_config(folder, peft_type=None)
    with pytest.raises(ValueError, match=r"`adapter` must say its method; the config of .* has peft_type=None"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


ASKED = [{"role": "user", "content": "say 1"}]
SIZES = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}


def save_lively(folder, adapt=get_peft_model, config=None):
    """Save a base and an adapter that change each other's answers."""
    base = tiny_llama(**SIZES)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.3)
    save_model(folder / "base", base)
    config = config or GraloraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    randomise(adapt(base, config), std=0.5).save_pretrained(folder / "runs/adapter", save_embedding_layers=False)
    change_config(folder / "runs/adapter", base_model_name_or_path=str(folder / "base"))
    return folder / "runs/adapter"


def options_for(adapter, **changes):
    return GenerationOptions(**({"adapter": str(adapter), "dtype": "fp32", "max_new_tokens": 8} | changes))


def answer_of(adapter, **changes):
    with answering(options_for(adapter, **changes)) as answerer:
        return answerer, answerer.stream(ASKED, lambda text: None)


LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize(("adapt", "config"), [(get_peft_model, None), (get_any_peft_model, LORA)])
def test_an_adapter_is_merged_first_and_answers_the_same(adapt, config, tmp_path, monkeypatch, capsys):
    adapter = save_lively(tmp_path, adapt, config)
    capsys.readouterr()
    answerer, answer = answer_of(adapter)
    names = [name for name, _ in answerer.model.named_parameters()]
    assert not [name for name in names if "gralora_" in name or "lora_" in name]
    assert answer != answer_of(adapter, use_adapter=False)[1]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("gralora.recipe.answering.answer._merge_refusal", lambda tuned: "of a test.")
    answerer, unmerged = answer_of(adapter)
    assert [name for name, _ in answerer.model.named_parameters() if "lora_" in name]
    assert unmerged == answer
    note = "note: the adapter is not merged into the base model, and answers come slower: of a test.\n"
    assert capsys.readouterr().err == note


def test_a_layer_that_cannot_be_merged_answers_unmerged(tmp_path, monkeypatch, capsys):
    adapter = save_lively(tmp_path)
    monkeypatch.setattr("gralora.tuner.layer.GraloraLayer.merge_refusal", lambda layer: "it is made of stone")
    answerer, _ = answer_of(adapter)
    assert len(gralora_layers(answerer.model)) == 4
    assert "answers come slower: it is made of stone" in capsys.readouterr().err


def test_on_a_quantised_base_the_adapter_stays_unmerged(tmp_path, capsys):
    adapter = save_lively(tmp_path)
    answerer, answer = answer_of(adapter, load_in="4bit")
    layers = gralora_layers(answerer.model)
    assert len(layers) == 4
    assert all(isinstance(layer.get_base_layer(), Linear4bit) for layer in layers.values())
    assert answer
    assert "the base model is quantised, and merging would round it again" in capsys.readouterr().err


def test_the_base_is_found_from_another_folder(tmp_path, monkeypatch):
    adapter = save_lively(tmp_path)
    change_config(adapter, base_model_name_or_path="base")
    expected = answer_of(adapter, model=str(tmp_path / "base"))[1]
    monkeypatch.chdir(adapter)
    assert answer_of(".")[1] == expected
    change_config(adapter, base_model_name_or_path="./gone")
    with pytest.raises(FileNotFoundError, match=r"names the base model './gone', and there is none at this path"):
        answer_of(".")


def test_the_chat_template_saved_with_the_adapter_is_used(tmp_path):
    adapter = save_lively(tmp_path)
    before = answer_of(adapter)[1]
    make_tokenizer("{{ messages[0]['content'] }} please").save_pretrained(adapter)
    answerer, answer = answer_of(adapter)
    assert answerer.tokenizer.decode(answerer.encode(ASKED)) == "say 1 please"
    assert answer != before


def test_a_conversation_needs_a_chat_template(tmp_path):
    adapter = save_lively(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    answerer, answer = answer_of(adapter)
    assert answer
    for conversation in ([*ASKED, *ASKED], [{"role": "system", "content": "s"}, *ASKED]):
        with pytest.raises(ValueError, match="must have a tokenizer with a chat template for a conversation"):
            answerer.encode(conversation)


def test_a_prompt_among_many_that_cannot_be_answered_is_said_before_any_answer(tmp_path):
    adapter = save_lively(tmp_path)
    with answering(options_for(adapter)) as answerer:
        answers = answerer.answers([ASKED, [{"role": "user", "content": "a" * 300}]])
        with pytest.raises(ValueError, match=r"must leave room for an answer; .* takes 256 .* \(prompt 2 of 2\)"):
            next(answers)
