import subprocess
import sys

import pytest
from command_line import run

from gralora.cli import build_command

VERBS = ["train", "generate", "chat", "merge", "export", "import", "inspect"]
SCRIPT = """
import contextlib, io, sys
from gralora import cli
for arguments in ([], ["--help"], ["--version"], *([verb, "--help"] for verb in sys.argv[1:])):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(arguments)
print(len(sys.modules), *sorted({name.partition(".")[0] for name in sys.modules}))
"""
HEAVY = {"torch", "transformers", "peft", "numpy", "datasets", "trl", "accelerate", "matplotlib", "safetensors"}


def test_every_verb_is_known():
    assert list(build_command().commands) == VERBS


def test_help_waits_for_no_library():
    """It then takes a fraction of a second; torch alone takes several."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, *VERBS], capture_output=True, text=True, check=True)
    count, *names = run.stdout.split()
    assert not HEAVY & set(names)
    assert int(count) < 600
    assert run.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_no_help_line_is_wider_than_a_terminal(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(verb, "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_shell_completes(monkeypatch, capsys):
    monkeypatch.setenv("_GRALORA_COMPLETE", "source_bash")
    assert run() == 0
    assert "_GRALORA_COMPLETE=complete_bash" in capsys.readouterr().out


def test_a_mistake_in_an_option_waits_for_no_library():
    script = "import sys; from gralora import cli; cli.main(['train', '--lr', '-1'])"
    script = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {script}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert not HEAVY & set(run.stdout.split())
