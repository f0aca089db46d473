"""The README runs as printed: its Python from top to bottom, its commands as far as the command line reads them."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_opt

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


def commands():
    for page in PAGES:
        for script in blocks("bash", page.read_text()):
            for line in script.replace("\\\n", " ").splitlines():
                if line.startswith("gralora "):
                    yield page.name, line


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_are_understood(page, line):
    import typer

    from gralora.cli import _app

    verb, *arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(_app()).commands[verb]
    command.make_context(verb, arguments, resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_has_the_front_door():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
