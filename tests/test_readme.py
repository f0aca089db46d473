"""The README runs as printed: its Python from top to bottom, its commands as far as the command line reads them.

Its numbers, and those of the other pages, are those of the code.
"""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import tiny_gpt2, tiny_llama, tiny_opt
from tiny_language_model import save_model, write_rows

from gralora import GraloraConfig, unregister_kind
from gralora.cli import build_command
from gralora.export.engines import VLLM_RANKS
from gralora.recipe.arguments import trainer_refusal
from gralora.recipe.options import TrainingOptions
from gralora.recipe.options_file import read_options_file
from gralora.tuner.fused import FEW_TOKENS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:`target_modules` names that match no module. 'o_proj':UserWarning")
@pytest.mark.filterwarnings("ignore:The adapter is merged; what is saved:UserWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_python_runs_as_printed(tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    tiny_opt(layers=4).save_pretrained(tmp_path / "facebook/opt-125m")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in blocks("python"):
        if "trainer.train()" in code:
            rows = [{"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)} for _ in range(4)]
            arguments = TrainingArguments(
                "out",
                max_steps=1,
                report_to="none",
                save_strategy="no",
                dataloader_pin_memory=False,
                disable_tqdm=True,
            )
            scope["trainer"] = Trainer(scope["peft_model"], arguments, train_dataset=rows)
        if "layers_pattern" in code:
            scope["model"] = tiny_llama(num_hidden_layers=4)
        elif "o_proj" in code:
            scope["model"] = tiny_opt()
        exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "gralora_adapter/adapter_model.safetensors").is_file()


def test_python_of_the_training_page_runs_as_printed(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    for code in blocks("python", (ROOT / "docs" / "training.md").read_text()):
        exec(compile(code, "training.md", "exec"), {})
    assert (tmp_path / "my-adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("text", blocks("yaml", (ROOT / "docs" / "training.md").read_text()))
def test_configuration_files_are_understood(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    if "distributed_type" in text:
        assert load_config_from_file(str(tmp_path / "run.yaml")).num_processes == 2
        return
    options = TrainingOptions(**read_options_file(str(tmp_path / "run.yaml")))
    assert trainer_refusal(options) is None


@pytest.mark.filterwarnings("ignore:`target_modules='all-linear'` adapts the experts too:UserWarning")
@pytest.mark.filterwarnings("ignore:This adapter uses `target_parameters`:UserWarning")
@pytest.mark.parametrize("page", ["layers.md", "moe.md"])
def test_python_of_a_page_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    try:
        for code in blocks("python", (ROOT / "docs" / page).read_text()):
            exec(compile(code, page, "exec"), scope)
    finally:
        if kind := scope.get("OnScaled"):
            unregister_kind(kind)


def commands():
    for page in PAGES:
        for script in blocks("bash", page.read_text()):
            for line in script.replace("\\\n", " ").splitlines():
                if line.startswith("gralora "):
                    yield page.name, line


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_are_understood(page, line):
    verb, *arguments = shlex.split(line, comments=True)[1:]
    build_command().commands[verb].make_context(verb, arguments, resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_has_the_front_door():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_configuration_table_has_the_defaults_of_the_code():
    table = README.partition("## Configuration")[2]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", table, flags=re.MULTILINE)
    written = {name: default for names, default in rows for name in re.findall(r"\w+", names)}
    assert written.pop("target_modules") == "by architecture"
    defaults = {name: getattr(GraloraConfig(), name) for name in written}
    assert {"r", "gralora_k", "alpha", "hybrid_r", "gralora_dropout"} <= defaults.keys()
    assert {name: ast.literal_eval(default.strip("`")) for name, default in written.items()} == defaults


def test_the_oldest_python_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"Python (3\.\d+)", README) == [project["requires-python"].removeprefix(">=")]


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        (r"Up to (\d+) tokens", FEW_TOKENS),
        (r"vLLM [\d.]+ and later \| up to (\d+)", VLLM_RANKS[-1]),
        (r"For ranks above (\d+), either", VLLM_RANKS[-1]),
    ],
)
def test_numbers_that_repeat_the_code_are_those_of_the_code(sentence, number):
    found = {page.name: number for page in PAGES for number in re.findall(sentence, page.read_text())}
    assert found
    assert found == dict.fromkeys(found, str(number))
