import pytest
from chat_templates import ALTERNATING, END_OF_TEXT, HEADERS, NO_SYSTEM, REASONING, THINKING_PROMPT
from tiny_language_model import CHAT_TEMPLATE, MARKED_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gralora import pretrained
from gralora.recipe.data import (
    IGNORED,
    check_prompts,
    encode,
    encode_prompt,
    parse_rows,
    template_stop_ids,
)
from gralora.recipe.tasks import support_rows

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def rows_of(*items):
    return parse_rows([(f"line {i}", item) for i, item in enumerate(items, start=1)], "rows.jsonl")


TWO_TURNS = messages(("user", "ask a"), ("assistant", "say b"), ("user", "ask c"), ("assistant", "say d"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CALLING = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "three", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Sums are sure."},
]


def encoded_of(item, tokenizer, **options):
    return encode(rows_of(item), tokenizer, **({"max_length": 5000, "source": "rows"} | options))


def learned(encoded, tokenizer):
    """The learned stretches of every sequence, as text."""
    found = []
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        stretches, open_ = [], False
        for token, label in zip(ids, labels, strict=True):
            if label == IGNORED:
                open_ = False
                continue
            assert label == token
            if not open_:
                stretches.append([])
            stretches[-1].append(token)
            open_ = True
        found.append([tokenizer.decode(stretch) for stretch in stretches])
    return found


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_only_the_answer_is_learned_and_it_follows_the_prompt_that_generation_uses(template):
    tokenizer = make_tokenizer(template)
    (row,) = rows_of({"prompt": "say 1", "completion": "one"})
    encoded = encode([row], tokenizer, max_length=100, source="rows")
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    prompt = encode_prompt(row.prompt, row.is_plain, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert tokenizer.decode(ids[len(prompt) :]).strip() == "one<|im_end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED_TEMPLATE, ["say b<|im_end|>", "say d<|im_end|>"]),
        (CHAT_TEMPLATE, ["say b<|im_end|>\n", "say d<|im_end|>\n"]),
        (HEADERS, ["say b<|im_end|>", "say d<|im_end|>"]),
        (ALTERNATING, [" say b<|im_end|>", " say d<|im_end|>"]),
        (NO_SYSTEM, ["say b<|im_end|>\n", "say d<|im_end|>\n"]),
        (END_OF_TEXT, ["say b<|im_start|>end\n", "say d<|im_start|>end\n<|im_end|>"]),
        (THINKING_PROMPT, ["say b<|im_end|>", "say d<|im_end|>"]),
    ],
)
def test_all_answers_are_learned_each_with_its_end(template, expected):
    tokenizer = make_tokenizer(template)
    encoded = encoded_of({"messages": TWO_TURNS}, tokenizer)
    assert learned(encoded, tokenizer) == [expected]
    assert encoded.input_ids == [tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]]
    assert encoded.notes == ()


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HEADERS, ALTERNATING, NO_SYSTEM, END_OF_TEXT, REASONING])
def test_every_answer_follows_the_tokens_of_its_prompt(template):
    tokenizer = make_tokenizer(template)
    encoded = encoded_of({"messages": TWO_TURNS}, tokenizer)
    for index in (1, 3):
        prompt = tokenizer.apply_chat_template(TWO_TURNS[:index], add_generation_prompt=True)["input_ids"]
        after = [
            (ids, labels)
            for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True)
            if ids[: len(prompt)] == prompt and labels[len(prompt)] != IGNORED and labels[len(prompt) - 1] == IGNORED
        ]
        assert len(after) == 1


def test_answers_that_the_template_changes_later_are_learned_as_they_are_generated():
    tokenizer = make_tokenizer(REASONING)
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nno\n</think>\n\nd"},
    ]
    encoded = encoded_of({"messages": conversation}, tokenizer)
    assert [tokenizer.decode(ids) for ids in encoded.input_ids] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nbecause\n</think>\n\nb<|im_end|>\n",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n",
    ]
    assert learned(encoded, tokenizer) == [
        ["<think>\nbecause\n</think>\n\nb<|im_end|>\n"],
        ["<think>\n\n</think>\n\nd<|im_end|>\n"],
    ]
    assert "1 conversation is trained on as several sequences" in encoded.notes[0]


def test_answers_between_two_questions_share_a_sequence():
    tokenizer = make_tokenizer(REASONING)
    encoded = encoded_of({"messages": CALLING, "tools": TOOLS}, tokenizer)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": null}}</tool_call>'
    think = "<think>\n\n</think>\n\n"
    assert learned(encoded, tokenizer) == [
        [f"{think}\n{call}<|im_end|>\n", f"{think}It is 3.<|im_end|>\n"],
        ["<think>\nSums are sure.\n</think>\n\nYes.<|im_end|>\n"],
    ]
    assert all('{"name": "add", "parameters"' in tokenizer.decode(ids) for ids in encoded.input_ids)
    assert "<tool_response>three</tool_response>" in tokenizer.decode(encoded.input_ids[0])
    assert "the chat template ignores `name` of messages." in encoded.notes


def test_function_calls_are_learned_in_the_form_of_the_template():
    tokenizer = make_tokenizer(HEADERS)
    encoded = encoded_of({"messages": CALLING[:4], "tools": TOOLS}, tokenizer)
    assert learned(encoded, tokenizer) == [
        ['{"name": "add", "parameters": {"a": 1, "b": null}}<|im_end|>', "It is 3.<|im_end|>"]
    ]
    assert "Functions: [" in tokenizer.decode(encoded.input_ids[0])


@pytest.mark.parametrize("template", [MARKED_TEMPLATE, CHAT_TEMPLATE])
def test_the_last_answer_or_everything_is_learned_on_request(template):
    tokenizer = make_tokenizer(template)
    (last,) = learned(encoded_of({"messages": TWO_TURNS}, tokenizer, train_on="last-answer"), tokenizer)
    assert [text.strip() for text in last] == ["say d<|im_end|>"]
    everything = encoded_of({"messages": TWO_TURNS}, tokenizer, train_on="everything")
    assert everything.labels == everything.input_ids == [tokenizer.apply_chat_template(TWO_TURNS)["input_ids"]]


def test_everything_of_plain_text_is_learned_on_request():
    tokenizer = make_tokenizer(None)
    encoded = encoded_of({"prompt": "ask ", "completion": "say"}, tokenizer, train_on="everything")
    assert learned(encoded, tokenizer) == [["ask say<|im_end|>"]]


@pytest.mark.parametrize("template", [MARKED_TEMPLATE, CHAT_TEMPLATE])
def test_answers_in_a_prompt_are_not_learned(template):
    tokenizer = make_tokenizer(template)
    item = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    ((text,),) = learned(encoded_of(item, tokenizer), tokenizer)
    assert text.strip() == "say d<|im_end|>"


def test_what_train_on_may_be_is_said():
    with pytest.raises(ValueError, match="`train_on` must be one of 'all-answers', 'last-answer', 'everything'; got"):
        encoded_of({"prompt": "a", "completion": "b"}, make_tokenizer(), train_on="answers")


def test_a_first_answer_without_a_question_is_not_learned_and_that_is_said():
    tokenizer = make_tokenizer()
    encoded = encoded_of({"messages": [{"role": "assistant", "content": "Hello!"}, *TWO_TURNS]}, tokenizer)
    assert learned(encoded, tokenizer) == [["say b<|im_end|>\n", "say d<|im_end|>\n"]]
    assert encoded.notes == ("1 conversation begins with an answer, which is not learned: nothing comes before it.",)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_plain_text_is_learned_whole_with_an_end(template):
    tokenizer = make_tokenizer(template)
    texts = ["some text", "ended<|im_end|>", "one<|im_end|>two"]
    encoded = encode(rows_of(*({"text": text} for text in texts)), tokenizer, 100, "rows")
    assert learned(encoded, tokenizer) == [["some text<|im_end|>"], ["ended<|im_end|>"], ["one<|im_end|>two<|im_end|>"]]


def test_an_answer_that_the_template_leaves_out_as_it_is_empty_is_an_end():
    silent = "{% for message in messages if message.content %}" + CHAT_TEMPLATE.partition("%}")[2]
    tokenizer = make_tokenizer(silent)
    encoded = encoded_of({"messages": [TWO_TURNS[0], {"role": "assistant", "content": ""}, *TWO_TURNS[2:]]}, tokenizer)
    assert learned(encoded, tokenizer) == [["<|im_end|>"], ["say d<|im_end|>\n"]]


def word_tokenizer():
    """A tokenizer of words, with a space in front of each, as SentencePiece's."""
    words = ["<s>", "</s>", "[INST]", "[/INST]", "<unk>", "▁", "▁a", "▁b", "a", "b", "▁c", "c"]
    tokenizer = Tokenizer(models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("▁", "a"), ("▁", "b"), ("▁", "c")],
        unk_token="<unk>",
    ))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        bos_token="<s>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    wrapped.chat_template = (
        "{{ '<s>' }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' + message.content + '[/INST]' }}{% else %}{{ ' ' + message.content + '</s>' }}{% endif %}"
        "{% endfor %}"
    )
    return wrapped


def test_an_answer_has_the_tokens_of_the_whole_text_where_none_spans_its_start():
    tokenizer = word_tokenizer()
    encoded = encoded_of({"messages": messages(("user", "a"), ("assistant", "b a"))}, tokenizer)
    names = tokenizer.convert_ids_to_tokens(encoded.input_ids[0])
    assert names == ["<s>", "[INST]", "▁a", "[/INST]", "▁b", "▁a", "</s>"]
    assert encoded.labels[0] == [IGNORED] * 4 + encoded.input_ids[0][4:]


def test_a_token_that_spans_the_start_of_an_answer_is_divided_as_in_generation():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content + ' ' }}"
        "{% else %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
    )
    rows = rows_of({"messages": messages(("user", "a"), ("assistant", "b"))})
    assert "▁b" in tokenizer.convert_ids_to_tokens(tokenizer("a b")["input_ids"])
    encoded = encode(rows, tokenizer, 100, "rows")
    prompt = encode_prompt(rows[0].prompt, False, tokenizer)
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "▁"
    assert encoded.input_ids[0][: len(prompt)] == prompt
    assert encoded.labels[0] == [IGNORED] * len(prompt) + encoded.input_ids[0][len(prompt) :]


def test_a_document_has_one_start_and_one_end_whatever_the_tokenizer_adds():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    rows = [*rows_of({"text": "a b"}, {"text": "<s>a b</s>"}), *rows_of({"prompt": "a", "completion": " b"})]
    for ids in encode(rows, tokenizer, 100, "rows").input_ids:
        # After a token in the text, this tokenizer puts no space.
        assert [name.strip("▁") for name in tokenizer.convert_ids_to_tokens(ids)] == ["<s>", "a", "b", "</s>"]


def test_a_tokenizer_without_offsets_encodes_the_pieces(monkeypatch):
    tokenizer = make_tokenizer()
    expected = encoded_of({"messages": TWO_TURNS}, tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encoded_of({"messages": TWO_TURNS}, tokenizer) == expected


def test_an_answer_that_the_template_does_not_end_gets_an_end():
    tokenizer = make_tokenizer(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    encoded = encoded_of({"prompt": "a", "completion": "b"}, tokenizer)
    assert encoded.labels[0][-1] == tokenizer.eos_token_id


def test_a_row_whose_answer_is_cut_away_is_named():
    rows = rows_of({"prompt": "a", "completion": "b"}, {"prompt": "a" * 50, "completion": "b"})
    with pytest.raises(ValueError, match=r"line 2 has 69 tokens before its completion.*`max_length` is 60"):
        encode(rows, make_tokenizer(), max_length=60, source="rows")


def test_a_row_whose_answer_is_cut_in_part_is_counted():
    encoded = encode(rows_of({"prompt": "a", "completion": "b" * 50}), make_tokenizer(), 60, "rows")
    assert encoded.truncated == 1
    assert len(encoded.input_ids[0]) == len(encoded.labels[0]) == 60


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, REASONING])
def test_a_later_answer_may_be_cut_away_where_an_earlier_one_is_left(template):
    tokenizer = make_tokenizer(template)
    encoded = encoded_of(
        {"messages": [*TWO_TURNS[:2], {"role": "user", "content": "c" * 300}, TWO_TURNS[3]]}, tokenizer, max_length=200
    )
    ((text,),) = learned(encoded, tokenizer)
    assert text.endswith("say b<|im_end|>\n")
    assert encoded.truncated == 1


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        encoded_of({"messages": TWO_TURNS}, make_tokenizer(None))


def test_a_template_is_chosen_from_several_as_generation_does():
    tokenizer = make_tokenizer({"default": CHAT_TEMPLATE, "tool_use": REASONING})
    assert len(encoded_of({"messages": TWO_TURNS}, tokenizer).input_ids) == 1
    assert len(encoded_of({"messages": TWO_TURNS, "tools": TOOLS}, tokenizer).input_ids) == 2


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_a_row_that_the_chat_template_refuses_is_named(template):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    rows = rows_of(
        {"messages": TWO_TURNS},
        {"messages": messages(("system", "s"), ("user", "a"), ("assistant", "b"))},
    )
    tokenizer = make_tokenizer(refusing + template)
    with pytest.raises(ValueError, match="1 bad row in 'rows': line 2 is refused by the chat template: no system role"):
        encode(rows, tokenizer, 300, "rows")
    with pytest.raises(ValueError, match="line 2 is refused by the chat template: no system role"):
        check_prompts(rows, tokenizer, "rows")


def test_a_template_that_refuses_a_lone_question_is_no_error_for_rows():
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    rows = rows_of({"messages": messages(("system", "s"), ("user", "a"), ("assistant", "b"))})
    assert encode(rows, make_tokenizer(needs + CHAT_TEMPLATE), 100, "rows").labels


def test_an_answer_outside_of_the_marks_is_an_error():
    tokenizer = make_tokenizer(CHAT_TEMPLATE + "{% generation %}{% endgeneration %}")
    with pytest.raises(ValueError, match="line 1 has no answer that the chat template marks"):
        encoded_of({"messages": TWO_TURNS}, tokenizer)


def test_rows_to_score_need_an_answer_of_text():
    with pytest.raises(ValueError, match=r"1 bad row in 'e.jsonl': line 1 is plain `text`, which has no answer"):
        check_prompts(rows_of({"text": "a"}), make_tokenizer(), "e.jsonl")
    with pytest.raises(ValueError, match="line 1 ends with a function call, which is not compared"):
        check_prompts(rows_of({"messages": CALLING[:2]}), make_tokenizer(HEADERS), "e.jsonl")
    with pytest.raises(ValueError, match="line 1 has `tools`, which the chat template ignores"):
        check_prompts(rows_of({"messages": TWO_TURNS, "tools": TOOLS}), make_tokenizer(), "e.jsonl")


def test_a_prompt_shows_the_functions():
    tokenizer = make_tokenizer(HEADERS)
    (row,) = rows_of({"messages": TWO_TURNS, "tools": TOOLS})
    ids = encode_prompt(row.prompt, row.is_plain, tokenizer, row.tools)
    assert tokenizer.decode(ids).startswith('<|im_start|>user\n\nFunctions: [{"type": "function"')


def test_the_end_of_a_turn_stops_an_answer_even_where_it_is_not_the_end_of_text():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    assert template_stop_ids(tokenizer) == [0, 2]


def test_the_fingerprint_depends_on_the_order_of_the_rows():
    first, second = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
    tokenizer = make_tokenizer()
    prints = {
        encode(rows_of(*rows), tokenizer, 100, "rows").fingerprint() for rows in ((first, second), (second, first))
    }
    assert len(prints) == 2


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.resolve(pretrained.DEFAULT_MODEL, pretrained.choose_dtype()).load_tokenizer()


def test_the_packaged_task_is_learned_in_the_tokens_of_smollm2(smollm2):
    rows = rows_of(*support_rows("eval"))
    encoded = encode(rows, smollm2, 512, "task")
    for row, ids, labels in zip(rows, encoded.input_ids, encoded.labels, strict=True):
        prompt = encode_prompt(row.prompt, row.is_plain, smollm2)
        answer = smollm2(row.completion + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
        assert ids == prompt + answer
        assert labels == [IGNORED] * len(prompt) + answer


def test_smollm2_learns_all_answers_and_refuses_functions(smollm2):
    encoded = encoded_of({"messages": TWO_TURNS}, smollm2)
    assert learned(encoded, smollm2) == [["say b<|im_end|>\n", "say d<|im_end|>\n"]]
    with pytest.raises(ValueError, match="line 1 has `tools`, which the chat template ignores"):
        encoded_of({"messages": TWO_TURNS, "tools": TOOLS}, smollm2)
    with pytest.raises(ValueError, match=r"line 1 is refused by the chat template: .*'content'"):
        encoded_of({"messages": CALLING[:2]}, smollm2)
