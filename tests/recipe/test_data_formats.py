import json

import pytest

from gralora.recipe.data import parse_rows

GOOD = {"prompt": "a", "completion": "b"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


QUESTION, ANSWER = messages(("user", "a"), ("assistant", "b"))


def rows_of(*items):
    return parse_rows([(f"line {i}", item) for i, item in enumerate(items, start=1)], "rows.jsonl")


def row_of(**item):
    (row,) = rows_of(item)
    return row


def calls(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"prompt": "a"}, "line 2 has no `completion`"),
        ({"completion": "a"}, "line 2 has no `prompt`"),
        ({"id": "a"}, "line 2 has none of `messages`, `conversations`, `prompt`/`completion`, `instruction`/`output`"),
        ({"id": "a"}, "and `text` (its fields: 'id')"),
        ({}, "its fields: none"),
        ({"instruction": "a"}, "line 2 has no `output`"),
        ([1], "line 2 is an array, not a JSON object"),
        ([], "line 2 is an empty array, not a JSON object"),
        ("a", "line 2 is a string, not a JSON object"),
        ({"prompt": 1, "completion": "b"}, "got a number and a string"),
        ({"prompt": "a", "completion": None}, "line 2 has no `completion`"),
        ({"prompt": "a", "completion": " "}, "line 2 has an empty `completion`"),
        ({"messages": [], "prompt": "a", "completion": "b"}, "has `messages` and `prompt`/`completion`; use one"),
        (
            {"messages": [QUESTION, ANSWER]},
            "line 2 has `messages` where line 1 has `prompt`/`completion`; use one format",
        ),
        ({"messages": []}, "must have a list of messages in `messages`; got an empty array"),
        ({"messages": "a"}, "must have a list of messages in `messages`; got a string"),
        ({"messages": [1]}, "has a number as message 1 of `messages`"),
        ({"messages": [{"role": "user"}]}, "has no `content` in message 1"),
        ({"messages": [{"content": "a"}]}, "has no `role` in message 1"),
        ({"messages": [{"role": "user", "content": None}]}, "has null as `content` in message 1"),
        ({"messages": [{"role": "user", "content": 1}]}, "has a number as `content` in message 1"),
        ({"messages": [QUESTION]}, "ends `messages` with role 'user'"),
        ({"messages": [ANSWER]}, "line 2 has one message"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "has an empty last message in `messages`"),
        (
            {"messages": [QUESTION, calls("1, 2")]},
            "has arguments of 'f' in message 2 of `messages` that are not a JSON",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "has a function call without a name in message 2",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": "f()"}]},
            "has a string as `tool_calls` in message 2",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ANSWER]},
            "has a part of type 'image' in message 1 of `messages`; only text is trained on",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}, ANSWER]}, "has a string as a part in message 1"),
        ({"messages": [QUESTION, ANSWER], "tools": "add"}, "must have a list of JSON schemas in `tools`; got a string"),
        ({"messages": [QUESTION, ANSWER], "tools": [1]}, "has a number as entry 1 of `tools`"),
        ({"prompt": [QUESTION], "completion": [QUESTION]}, "begins `completion` with role 'user'"),
        ({"prompt": [QUESTION], "completion": [ANSWER, QUESTION]}, "ends `completion` with role 'user'"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "has 'bot' as `from` in message 1 of `conversations`"),
        ({"conversations": [{"from": "human"}]}, "has no `value` in message 1 of `conversations`"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "has no function call in message 1"),
        (
            {"conversations": messages(("system", "s"), ("user", "a"), ("assistant", "b")), "system": "t"},
            "has `system` and a system message",
        ),
        ({"instruction": "a", "output": ""}, "has an empty `output`"),
        ({"instruction": 1, "output": "b"}, "has a number as `instruction`; it must be text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "must have pairs of a question and its answer"),
        ({"text": " "}, "has an empty `text`"),
        ({"text": "a\ud83d"}, r"has half of a surrogate pair, '\ud83d', in the text of role 'assistant'"),
        (
            {"prompt": "\udc00", "completion": "b"},
            r"has half of a surrogate pair, '\udc00', in the text of role 'user'",
        ),
    ],
)
def test_a_bad_row_is_named(item, problem):
    with pytest.raises(ValueError, match=r"1 bad row in 'rows.jsonl': line 2 ") as error:
        rows_of(GOOD, item)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_many_bad_rows_are_counted_and_the_first_ones_named():
    with pytest.raises(ValueError, match=r"9 bad rows in .*line 1 .*line 5 .*; and 4 more\.") as error:
        rows_of(*[{"prompt": "a"}] * 9)
    assert "line 6" not in str(error.value)


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match=r"`data` must have at least one row; 'rows.jsonl' is empty\."):
        rows_of()


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"conversations": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b", "system": "", "history": []},
        {"instruction": "", "input": "a", "output": "b"},
    ],
)
def test_every_format_holds_the_same_question_and_answer(item):
    row = row_of(**item)
    assert row.messages == [QUESTION, ANSWER]
    assert (row.prompt, row.completion) == ((QUESTION,), "b")
    assert row.tools == ()
    assert row.is_plain is (isinstance(item.get("prompt"), str) or "instruction" in item)


def test_everything_in_messages_is_kept():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": None}}}
    conversation = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "a", "name": "bob"},
        {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    row = row_of(messages=[{**message, "audio": None} for message in conversation], tools=[TOOL])
    assert row.messages == conversation
    assert row.tools == (TOOL,)
    assert row.completion == ""


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]])
def test_tools_may_be_text_or_bare_functions(tools):
    assert row_of(messages=[QUESTION, ANSWER], tools=tools).tools == (TOOL,)
    assert not row_of(prompt="a", completion="b", tools=tools).is_plain


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_a_call_are_an_object(arguments):
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    bare = {"name": "add", "arguments": arguments}
    expected = {"role": "assistant", "tool_calls": [called]}
    assert row_of(messages=[QUESTION, {"role": "assistant", "tool_calls": [bare]}]).answer == expected
    for value in (bare, [bare]):
        turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(value)}]
        assert row_of(conversations=turns).answer == expected


@pytest.mark.parametrize(
    "call", [{"name": "now"}, {"name": "now", "arguments": None}, {"name": "now", "arguments": ""}]
)
def test_a_call_may_have_no_arguments(call):
    answer = row_of(messages=[QUESTION, {"role": "assistant", "tool_calls": [call]}]).answer
    assert answer["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_the_roles_of_sharegpt():
    call = json.dumps({"name": "add", "arguments": {}})
    turns = [
        ("system", "s"),
        ("human", "a"),
        ("function_call", call),
        ("observation", "3"),
        ("tool", "4"),
        ("gpt", "b"),
    ]
    row = row_of(conversations=[{"from": who, "value": value} for who, value in turns], tools=json.dumps([TOOL]))
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert row.tools == (TOOL,)


def test_the_system_field_of_sharegpt_comes_first():
    row = row_of(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], system="s")
    assert row.messages == messages(("system", "s"), ("user", "a"), ("assistant", "b"))


def test_all_fields_of_alpaca():
    row = row_of(instruction="a", input="i", output="b", system="s", history=[["c", "d"]])
    assert row.messages == messages(
        ("system", "s"), ("user", "c"), ("assistant", "d"), ("user", "a\ni"), ("assistant", "b")
    )
    assert not row.is_plain


def test_plain_text_has_no_prompt():
    row = row_of(text="all of it")
    assert (row.prompt, row.completion, row.is_text, row.is_plain) == ((), "all of it", True, True)


def test_answers_before_a_completion_are_part_of_the_prompt():
    called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "1"}
    row = row_of(prompt=[QUESTION, ANSWER, QUESTION], completion=[called, result, ANSWER])
    assert len(row.messages) == 6
    assert row.first_learned == 3
    assert row_of(messages=[QUESTION, ANSWER]).first_learned == 0


def test_ignored_fields_are_said_once():
    rows = rows_of(*[{**GOOD, "id": 1, "source": "web"}] * 3, {**GOOD, "id": None, "score": 1})
    assert rows.notes == ("the fields `id`, `source` and `score` are ignored.",)
    assert rows_of({**GOOD, "id": 1}).notes == ("the field `id` is ignored.",)
    assert rows_of(GOOD).notes == ()


def test_fields_beside_a_whole_format_are_ignored():
    rows = rows_of({"messages": [QUESTION, ANSWER], "prompt": "a"})
    assert rows.notes == ("the field `prompt` is ignored.",)
    rows = rows_of({"instruction": "a", "output": "b", "text": "a b"})
    assert rows[0].messages == [QUESTION, ANSWER]
    assert rows.notes == ("the field `text` is ignored.",)
