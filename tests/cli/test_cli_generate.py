import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from conftest import randomise
from tiny_language_model import make_config, save_mixture, save_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gralora import GraloraConfig, get_peft_model, pretrained
from gralora.recipe.answering.answer import Answerer

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
    used, real = [], pretrained.load_adapter
    monkeypatch.setattr(
        "gralora.pretrained.load_adapter", lambda base, folder: (used.append(folder), real(base, folder))[1]
    )
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


SHORT = ("--max-new-tokens", "6", "--dtype", "fp32")


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """An adapter and a base whose answers depend on the prompt."""
    folder = tmp_path_factory.mktemp("lively")
    base = save_model(folder / "base", randomise_all(LlamaForCausalLM(make_config())))
    model = AutoModelForCausalLM.from_pretrained(base)
    randomise(get_peft_model(model, GraloraConfig(r=4, target_modules=["q_proj"])), std=1).save_pretrained(
        folder / "adapter"
    )
    return str(folder / "adapter")


@torch.no_grad()
def randomise_all(model):
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    return model


@pytest.fixture
def answered(lively, capsys):
    """Run the verb, and return what it printed."""

    def generate(*arguments, status=0):
        capsys.readouterr()
        assert run("generate", lively, *SHORT, *arguments) == status
        return capsys.readouterr()

    return generate


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("say 1\n\nsay something longer\nsay 3\n")
    return str(path)


def test_several_prompts_are_answered_as_single_ones(answered, prompts_file):
    alone = [answered("--prompt", prompt).out for prompt in ("say 1", "say something longer", "say 3")]
    assert len(set(alone)) > 1
    together = answered("--prompts", prompts_file, "--format", "jsonl", "--batch-size", "2").out
    rows = [json.loads(line) for line in together.split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == ["say 1", "say something longer", "say 3"]
    assert [row["answer"] + "\n" for row in rows] == alone
    assert answered("--prompts", prompts_file).out == "\n".join(answer.strip("\n") + "\n" for answer in alone)


def test_prompts_come_from_standard_input_too(answered, prompts_file, monkeypatch):
    from_file = answered("--prompts", prompts_file).out
    monkeypatch.setattr("sys.stdin", io.StringIO(Path(prompts_file).read_text()))
    assert answered("--prompts", "-").out == from_file


def test_conversations_are_answered(answered, tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "say 1")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "say 1"}) + "\n")
    rows = [
        json.loads(line)
        for line in answered("--prompts", str(tmp_path / "rows.jsonl"), "--format", "jsonl").out.split("\n")[:-1]
    ]
    assert rows[0]["messages"] == row["messages"]
    assert rows[0]["answer"] != rows[1]["answer"]


def test_a_system_prompt_is_put_before_the_prompt(answered, monkeypatch):
    asked, real = [], Answerer.encode
    monkeypatch.setattr(
        Answerer,
        "encode",
        lambda self, messages: (asked.append(self.tokenizer.decode(real(self, messages))), real(self, messages))[1],
    )
    answered("--prompt", "say 1", "--system", "be brief")
    answered("--prompt", "say 1")
    assert asked == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_sampling_from_the_likeliest_token_is_greedy(answered):
    greedy = answered("--prompt", "a").out
    assert answered("--prompt", "a", "--temperature", "5", "--top-k", "1").out == greedy
    assert answered("--prompt", "a", "--temperature", "5", "--top-p", "1e-6").out == greedy
    assert answered("--prompt", "a", "--temperature", "5").out != greedy


def test_the_number_of_threads_is_set(answered, monkeypatch):
    numbers = []
    monkeypatch.setattr("torch.set_num_threads", numbers.append)
    answered("--prompt", "a", "--threads", "1")
    assert numbers == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompts", "{file}"], "--prompt or --prompts must be given, not both"),
        (["--prompt", "a", "--format", "jsonl"], "--format must come with --prompts"),
        (["--prompt", "a", "--batch-size", "2"], "--batch-size must come with --prompts"),
        (["--prompts", "{file}", "--format", "xml"], "--format must be text or jsonl; got --format 'xml'"),
        (["--prompts", "nowhere"], "--prompts must be a file of prompts; there is no file 'nowhere'"),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p must come with a --temperature above 0"),
        (["--prompt", "a", "--load-in", "3bit"], "--load-in must be '4bit' or '8bit'; got --load-in '3bit'"),
        (["--prompt", "a" * 600], "--prompt must leave room for an answer; it has 6"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(answered, prompts_file, arguments, message):
    printed = answered(*[argument.format(file=prompts_file) for argument in arguments], status=2)
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_an_answer_ends_where_the_model_does(lively, capsys):
    capsys.readouterr()
    assert run("generate", lively, "--prompt", "a" * 470, "--max-new-tokens", "200") == 0
    assert "since the model takes 512 with the prompt" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["gralora.pretrained.load", "gralora.recipe.answering.answer.generate_ids"])
def test_ctrl_c_ends_quietly_at_any_time(answered, monkeypatch, place):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    printed = answered("--prompt", "a", status=130)
    assert (printed.out, printed.err) == ("\n", "")


def test_a_closed_pipe_ends_quietly(adapter):
    script = f"from gralora.cli import main; main(['generate', {adapter!r}, '--prompts', '-', '--max-new-tokens', '4'])"
    launch = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(launch, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("a\nb\n")
        process.stdin.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in errors
