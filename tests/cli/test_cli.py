import io
import json
import os
import signal

import pytest
from tiny_language_model import save_model, write_rows

from gralora import cli
from gralora.recipe.options_file import read_options_file
from gralora.recipe.progress import ConsoleReporter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", count=8)


@pytest.fixture(scope="module")
def adapter(model, rows, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("adapter") / "out")
    run("train", "--model", model, "--data", rows, "--output", output, "--r", "4", "--steps", "1")
    return output


def run(*arguments):
    """Return the exit status."""
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    return exit.value.code or 0


def test_training_end_to_end(model, rows, tmp_path, capsys):
    output = str(tmp_path / "out")
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2, start=50)
    settings = ["--model", model, "--data", rows, "--eval", held_out, "--output", output]
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


def test_an_interrupted_run_says_how_to_go_on_and_does(model, rows, tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "out")
    show = ConsoleReporter.step

    def interrupt(self, step, *rest):
        show(self, step, *rest)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ConsoleReporter, "step", interrupt)
    assert run("train", "--model", model, "--data", rows, "--output", output, "--r", "4", "--steps", "3") == 130
    printed = capsys.readouterr().out
    assert "interrupted after step 2 of 3" in printed
    command = f"gralora train --resume --output {output}"
    assert f"to go on: {command}" in printed
    monkeypatch.undo()
    assert run(*command.split()[1:]) == 0
    assert "3 steps" in capsys.readouterr().out


def test_an_interruption_before_the_first_step_ends_with_130(model, rows, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleReporter, "ready", interrupt)
    assert run("train", "--model", model, "--data", rows, "--output", str(tmp_path / "out"), "--r", "4") == 130
    assert "stopped before the first step" in capsys.readouterr().out


def test_the_command_line_wins_over_the_file(model, rows, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model}\ndata: {rows}\nr: 8\nlr: 1e-4\nepochs: 3\nbatch-size: 2\ntarget_modules: [q_proj]\n"
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
        ("r: many", "`r` must be of type int; got r='many'."),
        ("r: true", "`r` must be of type int; got r=True."),
        ("lr: fast", "`lr` must be of type float; got lr='fast'."),
        ("[1]", "`config` must map names to values"),
        ("r: [", "`config` must be a YAML file"),
        ("max_length: 1\nmax-length: 2", "got 'max-length' twice"),
        ("r: -1", "`r` must be a positive integer; got r=-1."),
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


def test_an_empty_file_holds_no_options(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\nlr:\n")
    assert read_options_file(str(file)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["train", "--data", "{bad}"], "line 1 is not valid JSON"),
        (["train", "--data", "{rows}", "--model", "./nowhere"], "there is no './nowhere'"),
        (["train", "--config", "nowhere.yaml"], "there is no 'nowhere.yaml'"),
        (["train", "--r", "6", "--k", "4"], "`gralora_k` must divide `r`; got gralora_k=4 with r=6."),
        (["train", "--resume"], "has no run.json"),
        (["generate", "nowhere"], "'nowhere' has no adapter_config.json"),
        (["generate", "{adapter}", "--prompt", " "], "`prompt` must have text"),
        (["generate", "{adapter}", "--prompt", "a", "--temperature", "-1"], "`temperature` must be zero or"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_and_ends_with_2(
    tmp_path, rows, adapter, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    capsys.readouterr()
    assert run(*[argument.format(bad="bad.jsonl", rows=rows, adapter=adapter) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_generating_streams_text_from_the_prompt_or_standard_input(adapter, capsys, monkeypatch):
    capsys.readouterr()
    assert run("generate", adapter, "--prompt", "say 1", "--max-new-tokens", "4") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n"))
    assert run("generate", adapter, "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out == first
    assert len(first) > 1


def test_the_base_answers_where_the_adapter_is_left_out(adapter, model, capsys, monkeypatch):
    used = []
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda base, folder: (used.append(folder), base)[1])
    capsys.readouterr()
    assert run("generate", adapter, "--prompt", "a", "--max-new-tokens", "2") == 0
    assert run("generate", adapter, "--prompt", "a", "--max-new-tokens", "2", "--no-adapter", "--model", model) == 0
    assert used == [adapter]


def test_sampling_depends_on_the_seed_alone(adapter, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        run("generate", adapter, "--prompt", "a", "--max-new-tokens", "8", "--temperature", "5", "--seed", seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_missing_library_is_said_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr("gralora.optional.importlib.util.find_spec", lambda name: None if name == "typer" else True)
    assert run("train") == 2
    assert 'Run: pip install "gralora[train]"' in capsys.readouterr().err
