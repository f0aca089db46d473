import json

import pytest

from gralora.recipe.data import read_rows

PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture
def file(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_several_sources_are_read_one_after_the_other_each_in_its_format(file):
    first, second = file("a.jsonl", PAIR, PAIR), file("b.jsonl", {"text": "c", "id": 1})
    rows = read_rows([first, second])
    assert [row.completion for row in rows] == ["b", "b", "c"]
    assert [row.where for row in rows] == [f"line 1 of {first!r}", f"line 2 of {first!r}", f"line 1 of {second!r}"]
    assert rows.notes == (f"the field `id` is ignored in {second!r}.",)
    assert list(read_rows(first)) == list(read_rows([first]))
    assert [row.where for row in read_rows(first)] == ["line 1", "line 2"]


def test_bad_rows_of_all_sources_are_named(file):
    first, second = file("a.jsonl", PAIR, {}), file("b.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match="2 bad rows in ") as error:
        read_rows([first, second])
    assert str(error.value).startswith(f"2 bad rows in {first!r} and {second!r}: line 2 of {first!r} has none of ")
    assert str(error.value).endswith(f"; line 1 of {second!r} has no `completion`.")


def test_a_source_without_rows_is_an_error(file):
    empty = file("empty.jsonl")
    with pytest.raises(ValueError, match=f"`eval` must have at least one row; {empty!r} is empty"):
        read_rows([file("a.jsonl", PAIR), empty], "eval")
    with pytest.raises(ValueError, match="`data` must name at least one source; got none"):
        read_rows([])


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\n\n" + json.dumps(PAIR).encode())
    assert [row.where for row in read_rows(str(path))] == ["line 1", "line 3"]


def test_messages_in_a_table_are_json_text(tmp_path):
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    cell = messages.replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'messages,tools\n"{cell}",\n')
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    assert row.messages == json.loads(messages)
