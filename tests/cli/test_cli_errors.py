import pytest
from command_line import run

from gralora import cli
from gralora.cli.errors import with_flags

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["train", "--data", "{bad}"], "line 1 is not valid JSON"),
        (["train", "--data", "{rows}", "--model", "./nowhere"], "there is no './nowhere'"),
        (["train", "--config", "nowhere.yaml"], "there is no 'nowhere.yaml'"),
        (["train", "--r", "6", "--k", "4"], "--k must divide --r; got --k 4 with --r 6."),
        (["train", "--resume"], "--resume needs the folder of an earlier run; 'gralora-adapter' has no run.json"),
        (["train", "--output", "{adapter}"], "Name another one, or continue the run in it with --resume."),
        (["generate", "nowhere"], "'nowhere' has no adapter_config.json"),
        (["generate", "{adapter}", "--prompt", " "], "--prompt must have text"),
        (["generate", "{adapter}", "--prompt", "a", "--temperature", "-1"], "--temperature must be zero or"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_and_ends_with_2(
    tmp_path, rows_file, adapter, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    capsys.readouterr()
    assert run(*[argument.format(bad="bad.jsonl", rows=rows_file, adapter=adapter) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out.startswith("\n")
    assert "Traceback" not in printed.err


def test_a_missing_library_is_said_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr("gralora.optional.importlib.util.find_spec", lambda name: None if name == "typer" else True)
    assert run("train") == 2
    assert 'Run: pip install "gralora[train]"' in capsys.readouterr().err


def verb(name):
    return cli.build_command().commands[name]


@pytest.mark.parametrize(
    ("name", "message", "told"),
    [
        ("export", "Name another one, or pass `overwrite=True`.", "Name another one, or pass --overwrite."),
        ("export", "`max_rank` must be positive; got max_rank=-1.", "--max-rank must be positive; got --max-rank -1."),
        ("export", "`output` must not exist; got output='a b'.", "OUTPUT must not exist; got OUTPUT 'a b'."),
        ("export", "`target` must be 'serving'; got target='x'.", "--for must be 'serving'; got --for 'x'."),
        ("export", "`for` must be serving; got for='peft'.", "--for must be serving; got --for 'peft'."),
        ("merge", "`adapter` must be a folder", "ADAPTER must be a folder"),
        ("export", "Pass `max_rank=512`.", "Pass --max-rank 512."),
        ("export", "needs `max_error`; got per_layer=True alone.", "needs --max-error; got per_layer=True alone."),
        ("train", "`gralora_dropout` must be in [0, 1)", "--dropout must be in [0, 1)"),
        ("train", 'or with `dtype="float32"`', "or with --dtype float32"),
        ("train", "`resume=False` would start over", "`resume=False` would start over"),
        ("train", "has `messages`, `gralora merge`, `run.json`", "has `messages`, `gralora merge`, `run.json`"),
        ("train", "'/runs/r=4/rows.jsonl' is empty", "'/runs/r=4/rows.jsonl' is empty"),
        ("train", "'my r=4 k=2' is empty; got r=1.", "'my r=4 k=2' is empty; got --r 1."),
        ("train", "got output='it is r=4 k=2'.", "got --output 'it is r=4 k=2'."),
        ("train", 'got output="it\'s r=4 k=2".', 'got --output "it\'s r=4 k=2".'),
        ("train", "the run's r is r=4, not k=2; it's", "the run's r is --r 4, not --k 2; it's"),
        ("inspect", "`output` must end in .png", "--plot must end in .png"),
        ("generate", "pass `use_adapter=False`", "pass --no-adapter"),
        ("merge", "`model` must be one that loads", "BASE must be one that loads"),
    ],
)
def test_python_arguments_are_told_as_flags(name, message, told):
    assert with_flags(message, verb(name)) == told


@pytest.mark.parametrize("name", ["chat", "export", "generate", "import", "inspect", "merge", "train"])
def test_every_parameter_of_every_verb_has_a_spelling(name):
    command = verb(name)
    for parameter in command.params:
        told = with_flags(f"`{parameter.name}`", command)
        assert told in (*parameter.opts, parameter.name.upper())
        assert told.isupper() == (parameter.param_type_name == "argument")


def test_an_interrupt_that_no_verb_catches_is_said(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gralora.cli.train.read_options_file", interrupted)
    assert run("train", "--config", "run.yaml") == 130
    assert capsys.readouterr().err == "stopped\n"
