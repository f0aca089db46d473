import io

import pytest
from command_line import run

from gralora.recipe.answering.answer import Answerer

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")

START = "<|im_start|>"


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model was given, as text."""
    given, real = [], Answerer._generate

    def generate(self, ids, *rest):
        given.append(self.tokenizer.decode(ids[0]))
        return real(self, ids, *rest)

    monkeypatch.setattr(Answerer, "_generate", generate)
    return given


@pytest.fixture
def chat(adapter, capsys, monkeypatch):
    """Run the verb on lines of input, and return what it printed."""

    def converse(*lines, arguments=(), status=0, terminal=False):
        source = io.StringIO("".join(f"{line}\n" for line in lines))
        source.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", source)
        capsys.readouterr()
        assert run("chat", adapter, "--max-new-tokens", "4", "--dtype", "fp32", *arguments) == status
        return capsys.readouterr()

    return converse


def users(prompt):
    """The messages of the user in a rendered prompt."""
    return [turn.partition("<|im_end|>")[0] for turn in prompt.split(f"{START}user\n")[1:]]


def test_the_conversation_goes_on_until_the_input_ends(chat, prompts):
    printed = chat("first", "", "second", "third")
    assert [users(prompt) for prompt in prompts] == [["first"], ["first", "second"], ["first", "second", "third"]]
    answers = printed.out
    assert "> " not in answers
    assert printed.err == ""
    for turn in prompts[2].split(f"{START}assistant\n")[1:-1]:
        assert turn.partition("<|im_end|>")[0] in answers


def test_the_answers_are_those_of_generate(chat, adapter, capsys):
    out = chat("say 1").out
    assert run("generate", adapter, "--prompt", "say 1", "--max-new-tokens", "4", "--dtype", "fp32") == 0
    assert capsys.readouterr().out == out


def test_commands_reset_set_the_system_prompt_and_quit(chat, prompts):
    printed = chat(
        "first", "/reset", "second", "/system be brief", "third", "/system", "fourth", "/nothing", "/quit", "no"
    )
    assert [users(prompt) for prompt in prompts] == [["first"], ["second"], ["third"], ["fourth"]]
    assert [prompt.startswith(f"{START}system\nbe brief<|im_end|>") for prompt in prompts] == [
        False,
        False,
        True,
        False,
    ]
    assert "there is no command /nothing: /reset forgets" in printed.err


def test_a_path_is_no_command(chat, prompts):
    chat("/etc/passwd is what?")
    assert users(prompts[0]) == ["/etc/passwd is what?"]


def test_the_oldest_turns_are_cut_where_the_conversation_is_too_long(chat, prompts):
    long = "x" * 200
    printed = chat(f"1{long}", f"2{long}", f"3{long}", arguments=["--system", "be brief"])
    assert [[text[0] for text in users(prompt)] for prompt in prompts] == [["1"], ["1", "2"], ["2", "3"]]
    assert all("be brief" in prompt for prompt in prompts)
    assert printed.err == "note: the conversation is too long for the model; its 2 oldest messages are left out\n"


def test_a_message_that_is_too_long_ends_a_pipe_and_is_left_out_at_a_terminal(chat, prompts):
    printed = chat("first", "x" * 600, "second", status=2)
    assert "must leave room for an answer; it has 6" in printed.err
    prompts.clear()
    printed = chat("first", "x" * 600, "second", terminal=True)
    assert "error: `prompt` must leave room for an answer; it has 6" in printed.err
    assert users(prompts[-1]) == ["first", "second"]
    assert "> " in printed.out
    assert "/reset forgets the conversation" in printed.err


def test_ctrl_c_ends_an_answer_at_a_terminal_and_a_chat_over_a_pipe(chat, prompts, monkeypatch):
    real, calls = Answerer.stream, []

    def stream(self, messages, write):
        calls.append(messages)
        if len(calls) == 1:
            write("part")
            raise KeyboardInterrupt
        return real(self, messages, write)

    monkeypatch.setattr(Answerer, "stream", stream)
    assert "part\n" in chat("first", "second", terminal=True).out
    assert f"{START}assistant\npart<|im_end|>" in prompts[0]
    calls.clear()
    chat("first", "second", status=130)


def test_ctrl_c_at_the_prompt_ends_the_chat(chat, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert chat("first", terminal=True, status=130).out == "\n"
