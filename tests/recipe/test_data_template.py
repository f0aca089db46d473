import pytest
from chat_templates import ALTERNATING, END_OF_TEXT, HEADERS, NO_SYSTEM, REASONING
from tiny_language_model import CHAT_TEMPLATE, MARKED_TEMPLATE, make_tokenizer

from gralora.recipe.data.template import IgnoredFields, TemplateRefusal, has_marks, render, render_answers

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
QUESTION, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
SYSTEM, RESULT = {"role": "system", "content": "be"}, {"role": "tool", "content": "3", "name": "add"}


def check(template, *conversations, tools=()):
    tokenizer = make_tokenizer(template)
    ignored = IgnoredFields(tokenizer)
    for messages in conversations:
        ignored.check(messages, tools, render(messages, tools, tokenizer))
    return ignored.names()


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (NO_SYSTEM, [SYSTEM, QUESTION, ANSWER], "is refused by the chat template: System role not supported"),
        (
            ALTERNATING,
            [QUESTION, QUESTION, ANSWER],
            "Conversation roles must alternate user/assistant/user/assistant/...",
        ),
        (HEADERS, [QUESTION, CALL | {"tool_calls": CALL["tool_calls"] * 2}], "Only one function call at once!"),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] + ''"), [QUESTION, CALL], "'content'"),
        ("{{ messages[0].content + 1 }}", [QUESTION, ANSWER], "chat template: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", [QUESTION, ANSWER], "is refused by the chat template: ZeroDivisionError: "),
        ("{% if %}", [QUESTION, ANSWER], "is refused by the chat template: "),
        ("{{ missing.name }}", [QUESTION, ANSWER], "is refused by the chat template: 'missing' is undefined"),
    ],
)
def test_a_template_that_fails_says_why_in_one_line(template, messages, reason):
    with pytest.raises(TemplateRefusal) as error:
        render_answers(messages, (), make_tokenizer(template), [len(messages) - 1])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_are_text_for_a_template_that_joins_them_with_text():
    template = (
        "{% for message in messages %}{{ message.content or '' }}{% for call in message.tool_calls %}"
        "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "ü"}}}
    messages = [QUESTION, {"role": "assistant", "tool_calls": [call]}]
    assert render(messages, (), make_tokenizer(template)) == 'askadd {"a": "ü"}'


def test_marks_are_found_in_the_template_that_is_used():
    assert has_marks((), make_tokenizer(MARKED_TEMPLATE))
    assert not has_marks((), make_tokenizer(CHAT_TEMPLATE))
    both = make_tokenizer({"default": CHAT_TEMPLATE, "tool_use": MARKED_TEMPLATE})
    assert (has_marks((), both), has_marks(TOOLS, both)) == (False, True)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HEADERS, ALTERNATING, NO_SYSTEM, END_OF_TEXT])
def test_one_rendering_holds_all_answers(template):
    tokenizer = make_tokenizer(template)
    messages = [QUESTION, ANSWER, {"role": "user", "content": "again"}, {"role": "assistant", "content": "last"}]
    (rendering,) = render_answers(messages, (), tokenizer, [1, 3])
    assert rendering.text == render(messages, (), tokenizer)
    first, last = (rendering.text[start:end] for start, end in rendering.answers)
    assert ("say" in first, "last" in first, "last" in last, "ask" in first, "again" in last) == (1, 0, 1, 0, 0)
    assert first.strip() != "say"


def test_a_conversation_that_changes_before_its_answer_is_refused():
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="has an answer in message 2 before which the chat template changes"):
        render_answers([QUESTION, ANSWER], (), make_tokenizer(template), [1])


def test_an_end_of_text_where_the_answer_would_be_is_no_change():
    template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
        "{{ '|' if add_generation_prompt else eos_token }}"
    )
    (rendering,) = render_answers([QUESTION, ANSWER], (), make_tokenizer(template), [1])
    assert (rendering.text, rendering.answers) == ("asksay<|im_end|>", ((3, 16),))


def test_nothing_comes_before_a_first_message():
    with pytest.raises(TemplateRefusal, match="begins with an answer"):
        render_answers([ANSWER], (), make_tokenizer(), [0])


def test_what_is_rendered_is_no_problem():
    conversation = [SYSTEM, QUESTION, CALL, RESULT, ANSWER, QUESTION, ANSWER | {"reasoning_content": "hm"}]
    assert check(REASONING, conversation, tools=TOOLS) == ["name"]
    assert check(HEADERS, [QUESTION, CALL, RESULT, ANSWER], tools=TOOLS) == ["name"]


def test_reasoning_of_earlier_turns_may_be_left_out():
    assert check(REASONING, [QUESTION, ANSWER | {"reasoning": "hm"}, QUESTION, ANSWER]) == []


TWO_ROLES = (
    "{% for message in messages if message.role in ('user', 'assistant') %}"
    "{{ message.role + ': ' + (message.content or '') + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([QUESTION, ANSWER], TOOLS, "has `tools`, which the chat template ignores"),
        ([QUESTION, CALL, RESULT, ANSWER], (), "has a message of role 'tool', whose content the chat template ignores"),
        ([QUESTION, CALL], (), "has `tool_calls` in message 2, which the chat template ignores"),
        ([QUESTION, CALL | ANSWER], (), "has `tool_calls` in message 2, which the chat template ignores"),
        ([QUESTION, ANSWER | {"thinking": "hm"}], (), "has `thinking` in message 2, which the chat template ignores"),
        ([SYSTEM, QUESTION, ANSWER], (), "has a message of role 'system', whose content the chat template ignores"),
        # Its content happens to be in the text all the same.
        ([SYSTEM | {"content": "ask"}, QUESTION, ANSWER], (), "has a message of role 'system'"),
    ],
)
def test_what_the_template_ignores_is_refused(messages, tools, reason):
    with pytest.raises(TemplateRefusal) as error:
        check(TWO_ROLES, messages, tools=tools)
    assert reason in str(error.value)


def test_other_fields_are_told_and_those_with_an_effect_are_not():
    template = CHAT_TEMPLATE.replace("message['content']", "(message.name or '') + message['content']")
    named, tagged = [QUESTION | {"name": "bob"}, ANSWER], [QUESTION | {"weight": 1, "name": ""}, ANSWER]
    assert check(template, tagged, named) == ["weight"]
    assert check(CHAT_TEMPLATE, tagged, named) == ["weight", "name"]
