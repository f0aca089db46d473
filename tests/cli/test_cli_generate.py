import io

import pytest
from command_line import run
from conftest import randomise
from tiny_language_model import save_mixture
from transformers import AutoModelForCausalLM

from gralora import GraloraConfig, get_peft_model

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_generating_streams_text_from_the_prompt_or_standard_input(adapter, capsys, monkeypatch):
    capsys.readouterr()
    assert run("generate", adapter, "--prompt", "say 1", "--max-new-tokens", "4") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n"))
    assert run("generate", adapter, "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out == first
    assert len(first) > 1


def test_the_base_answers_where_the_adapter_is_left_out(adapter, base_model, capsys, monkeypatch):
    used = []
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda base, folder: (used.append(folder), base)[1])
    capsys.readouterr()
    assert run("generate", adapter, "--prompt", "a", "--max-new-tokens", "2") == 0
    assert (
        run("generate", adapter, "--prompt", "a", "--max-new-tokens", "2", "--no-adapter", "--model", base_model) == 0
    )
    assert used == [adapter]


def test_sampling_depends_on_the_seed_alone(adapter, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        run("generate", adapter, "--prompt", "a", "--max-new-tokens", "8", "--temperature", "5", "--seed", seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_terminal_is_asked_for_the_prompt(adapter, capsys, monkeypatch):
    terminal = io.StringIO("say 1\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert run("generate", adapter, "--max-new-tokens", "1") == 0
    assert "reading the prompt from standard input; end with Ctrl-D\n" in capsys.readouterr().err


def test_usage_names_the_argument_as_errors_do(capsys):
    assert run("generate", "--help") == 0
    assert "ADAPTER" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.filterwarnings("ignore:This adapter uses `target_parameters`")
def test_a_mixture_answers_as_its_merged_model(tmp_path, capsys):
    base = save_mixture(tmp_path / "base")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = GraloraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
    model = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    assert run("merge", base, str(tmp_path / "adapter"), str(tmp_path / "merged")) == 0
    answers = []
    for arguments in ((base,), (str(tmp_path / "merged"), "--no-adapter"), (base, "--no-adapter")):
        capsys.readouterr()
        prompt = ("--prompt", "say 1", "--max-new-tokens", "8")
        assert run("generate", str(tmp_path / "adapter"), "--model", *arguments, *prompt) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
