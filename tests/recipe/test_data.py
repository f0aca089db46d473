import json

import pytest
from tiny_language_model import CHAT_TEMPLATE, MARKED_TEMPLATE, make_tokenizer

from gralora.recipe.data import IGNORED, check_prompts, encode, encode_prompt, parse_rows, read_rows, template_stop_ids
from gralora.recipe.tasks import support_rows

GOOD = '{"prompt": "a", "completion": "b"}'


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def rows_of(*items):
    return parse_rows([(f"line {i}", item) for i, item in enumerate(items, start=1)], "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", ', "line 2 is not valid JSON"),
        ('{"prompt": "a"}', "line 2 has no `completion`"),
        ('{"completion": "a"}', "line 2 has no `prompt`"),
        (
            '{"id": "a"}',
            "line 2 has none of `messages`, `conversations`, `prompt`/`completion`, `instruction`/`output`",
        ),
        ('{"id": "a"}', "and `text` (its fields: 'id')"),
        ('{"instruction": "a"}', "line 2 has no `output`"),
        ("{}", "its fields: none"),
        ("[1]", "line 2 is an array, not a JSON object"),
        ("[]", "line 2 is an empty array, not a JSON object"),
        ('"a"', "line 2 is a string, not a JSON object"),
        ('{"prompt": 1, "completion": "b"}', "got a number and a string"),
        ('{"prompt": "a", "completion": null}', "line 2 has no `completion`"),
        ('{"prompt": "a", "completion": " "}', "line 2 has an empty `completion`"),
        ('{"messages": [], "prompt": "a", "completion": "b"}', "line 2 has `messages` and `prompt`/`completion`"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "use one format"),
        ('{"messages": []}', "must have a list of messages in `messages`; got an empty array"),
        ('{"messages": "a"}', "must have a list of messages in `messages`; got a string"),
        ('{"messages": [1]}', "has a number as message 1 of `messages`"),
        ('{"messages": [{"role": "user"}]}', "has no `content` in message 1"),
        ('{"messages": [{"role": "user", "content": null}]}', "has null as `content` in message 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends `messages` with role 'user'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 has one message"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "a"}]}',
            "line 2 begins `completion` with role 'user'",
        ),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match="1 bad row in") as error:
        read_rows(str(path))
    assert problem in str(error.value)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + b'{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(ValueError, match="line 2 is not UTF-8 text"):
        read_rows(str(path))


def test_many_bad_rows_are_counted_and_the_first_ones_named():
    with pytest.raises(ValueError, match=r"9 bad rows in .*line 1 .*line 5 .*; and 4 more\.") as error:
        rows_of(*[{"prompt": "a"}] * 9)
    assert "line 6" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="must have at least one row"):
        read_rows(str(path))


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere.jsonl'"):
        read_rows("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="`eval` must be a file"):
        read_rows("nowhere.jsonl", "eval")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\n\n" + GOOD.encode())
    assert [row.where for row in read_rows(str(path))] == ["line 1", "line 3"]


def test_a_folder_is_read_as_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(GOOD + "\n" + GOOD + "\n")
    assert [row.where for row in read_rows(str(folder))] == ["row 1", "row 2"]


def test_a_name_that_is_neither_a_file_nor_a_dataset_is_said():
    with pytest.raises(ValueError, match=r"got 'nobody/nothing': it is not a file, and fails to load as a dataset: "):
        read_rows("nobody/nothing")


def test_messages_and_a_pair_of_message_lists_are_the_same_row():
    (one,) = rows_of({"messages": messages(("user", "a"), ("assistant", "b"))})
    (other,) = rows_of({"prompt": messages(("user", "a")), "completion": messages(("assistant", "b"))})
    assert (one.prompt, one.completion) == (other.prompt, other.completion)


@pytest.mark.parametrize("template", [None, "chat"])
def test_only_the_answer_is_learned_and_it_follows_the_prompt_that_generation_uses(template):
    tokenizer = make_tokenizer(*(() if template else (None,)))
    (row,) = rows = rows_of({"prompt": "say 1", "completion": "one"})
    encoded = encode(rows, tokenizer, max_length=100, source="rows")
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    prompt = encode_prompt(row.prompt, row.is_plain, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert tokenizer.decode(ids[len(prompt) :]).strip() == "one<|im_end|>"


def test_all_answers_are_learned_with_and_without_marks():
    conversation = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rows = rows_of({"messages": conversation})
    marked, unmarked = make_tokenizer(MARKED_TEMPLATE), make_tokenizer()
    for tokenizer, expected in ((marked, "b<|im_end|>d<|im_end|>"), (unmarked, "b<|im_end|>\nd<|im_end|>\n")):
        encoded = encode(rows, tokenizer, 200, "rows")
        assert tokenizer.decode([i for i in encoded.labels[0] if i != IGNORED]) == expected
        assert encoded.notes == ()


def test_an_answer_that_the_template_does_not_end_gets_an_end():
    tokenizer = make_tokenizer(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    encoded = encode(rows_of({"prompt": "a", "completion": "b"}), tokenizer, 100, "rows")
    assert encoded.labels[0][-1] == tokenizer.eos_token_id


def test_a_row_whose_answer_is_cut_away_is_named():
    rows = rows_of({"prompt": "a", "completion": "b"}, {"prompt": "a" * 50, "completion": "b"})
    with pytest.raises(ValueError, match=r"line 2 has 69 tokens before its completion.*`max_length` is 60"):
        encode(rows, make_tokenizer(), max_length=60, source="rows")


def test_a_row_whose_answer_is_cut_in_part_is_counted():
    encoded = encode(rows_of({"prompt": "a", "completion": "b" * 50}), make_tokenizer(), 60, "rows")
    assert encoded.truncated == 1
    assert len(encoded.input_ids[0]) == len(encoded.labels[0]) == 60


def test_conversations_need_a_chat_template():
    rows = rows_of({"messages": messages(("user", "a"), ("assistant", "b"))})
    with pytest.raises(ValueError, match="no chat template"):
        encode(rows, make_tokenizer(None), 100, "rows")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_a_row_that_the_chat_template_refuses_is_named(template):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    rows = rows_of(
        {"messages": messages(("user", "a"), ("assistant", "b"))},
        {"messages": messages(("system", "s"), ("user", "a"), ("assistant", "b"))},
    )
    tokenizer = make_tokenizer(refusing + template)
    with pytest.raises(ValueError, match="line 2 is refused by the chat template: no system role"):
        encode(rows, tokenizer, 100, "rows")
    with pytest.raises(ValueError, match="line 2 is refused by the chat template: no system role"):
        check_prompts(rows, tokenizer, "rows")


def test_a_template_that_needs_a_system_message_encodes_rows_that_have_one():
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    rows = rows_of({"messages": messages(("system", "s"), ("user", "a"), ("assistant", "b"))})
    assert encode(rows, make_tokenizer(needs + CHAT_TEMPLATE), 100, "rows").labels


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


def test_the_held_out_rows_of_the_packaged_task_are_combinations_not_trained_on():
    def key(row, *names):
        answer = json.loads(row["completion"])
        return tuple(answer[name] for name in names)

    train, held_out = support_rows("train"), support_rows("eval")
    for names in (("product", "issue", "urgency"), ("order",)):
        assert not {key(row, *names) for row in train} & {key(row, *names) for row in held_out}
    for name in ("product", "issue", "urgency"):
        assert {key(row, name) for row in held_out} <= {key(row, name) for row in train}
    for row in (*train, *held_out):
        answer = json.loads(row["completion"])
        assert answer["product"] in row["prompt"]
        assert answer["order"] in row["prompt"]
    assert support_rows("train") == train
