import pytest

from gralora.recipe.data import Row, Rows
from gralora.recipe.data.rows import quoted, raise_for, source_names

ROW = Row("line 1", ({"role": "user", "content": "a"},), {"role": "assistant", "content": "b"}, False)


def test_rows_are_a_sequence():
    rows = Rows((ROW, ROW))
    assert (len(rows), rows[0], rows[:1], list(rows), bool(Rows(()))) == (2, ROW, (ROW,), [ROW, ROW], False)


def test_names_are_listed_in_words():
    assert [quoted(list(names)) for names in ("a", "ab", "abc")] == ["`a`", "`a` and `b`", "`a`, `b` and `c`"]
    assert source_names("a.jsonl") == source_names(["a.jsonl"]) == "'a.jsonl'"
    assert source_names(["a", "b", "-"]) == "'a', 'b' and '-'"


def test_bad_rows_are_an_error_and_none_are_not():
    raise_for([], "rows")
    with pytest.raises(ValueError, match=r"^1 bad row in 'rows': line 1 is bad\. Mend it\.$"):
        raise_for(["line 1 is bad"], "rows", " Mend it.")
