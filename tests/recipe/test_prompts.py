import json

import pytest

from gralora.recipe.answering.prompts import parse_prompts, read_prompts


def user(text):
    return [{"role": "user", "content": text}]


def test_a_line_is_a_prompt(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  second \n{third\n")
    assert read_prompts(path) == [user("first"), user("  second "), user("{third")]


def test_json_lines_hold_prompts_or_conversations(tmp_path):
    rows = [{"prompt": "a", "id": 1}, {"messages": user("b")}, {"prompt": user("c")}]
    lines = [json.dumps(row) for row in rows]
    assert parse_prompts("\n".join(lines), "rows") == [user("a"), user("b"), user("c")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "rows.jsonl") == [user("a"), user("b"), user("c")]


def test_text_that_begins_like_json_is_text():
    assert parse_prompts('[1] is what?\n{"prompt": "a"}', "rows") == [user("[1] is what?"), user('{"prompt": "a"}')]


def test_a_separator_inside_a_string_ends_no_line():
    assert parse_prompts('{"prompt": "a\u2028b"}', "rows") == [user("a\u2028b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 100_000, "line 2 is nested too deeply"),
        ("[]", "line 2 must be a JSON object with either `prompt` or `messages`"),
        ('{"text": "a"}', "line 2 must be a JSON object with either"),
        ('{"prompt": "a", "messages": []}', "line 2 must be a JSON object with either"),
        ('{"prompt": " "}', "line 2 has an empty `prompt`"),
        ('{"prompt": 1}', "line 2 must have text or a list of messages in `prompt`"),
        ('{"prompt": "a", "tools": [{}]}', "line 2 has `tools`, which answers here cannot call"),
        ('{"messages": "a"}', "line 2 must have a list of messages in `messages`"),
        ('{"messages": []}', "line 2 must have a list of messages in `messages`"),
        ('{"messages": ["a"]}', "line 2 must have text as `role` and `content` of message 1 of `messages`"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "line 2 must have text as `role` and `content` of message 1",
        ),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}', "line 2 has `tool_calls` in message 1"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 ends `messages` with role 'assistant'"),
    ],
)
def test_a_bad_line_is_said_by_its_number(line, message):
    with pytest.raises(ValueError, match=r"^1 bad line in 'rows': ") as error:
        parse_prompts('{"prompt": "a"}\n' + line, "rows")
    assert message in str(error.value)


def test_many_bad_lines_are_summed_up():
    with pytest.raises(ValueError, match=r"^7 bad lines in 'rows': line 2 .*; and 2 more\.$"):
        parse_prompts('{"prompt": "a"}' + "\n[]" * 7, "rows")


def test_a_file_without_prompts_or_without_text_is_said(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="must have at least one prompt"):
        read_prompts(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"\xe4")
    with pytest.raises(ValueError, match="`prompts` must be UTF-8 text"):
        read_prompts(tmp_path / "latin")
    with pytest.raises(FileNotFoundError, match="`prompts` must be a file of prompts"):
        read_prompts(tmp_path)
