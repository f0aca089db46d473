import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora.recipe.data import count_repeated, parse_rows, split_rows


def rows_of(answers):
    items = [(f"line {i}", {"prompt": "a", "completion": str(answer)}) for i, answer in enumerate(answers)]
    return parse_rows(items, "rows")


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda answers: len(set(answers)) > 1),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 5),
)
def test_both_parts_have_rows_and_share_none(answers, share, seed):
    rows = rows_of(answers)
    training, validation = split_rows(rows, share, seed)
    assert training
    assert validation
    assert sorted([*training, *validation], key=lambda row: int(row.where[5:])) == list(rows)
    assert not {row.completion for row in training} & {row.completion for row in validation}
    for part in (training, validation):
        numbers = [int(row.where[5:]) for row in part]
        assert numbers == sorted(numbers)


def test_the_share_is_kept_and_the_seed_decides():
    rows = rows_of(range(200))
    parts = [split_rows(rows, 0.05, seed) for seed in (0, 0, 1)]
    assert [len(validation) for _, validation in parts] == [10, 10, 10]
    assert parts[0] == parts[1]
    assert parts[0] != parts[2]


def test_the_smallest_group_of_equal_rows_is_set_aside_where_none_fits():
    for seed in range(5):
        training, validation = split_rows(rows_of([1, 1, 1, 2, 2]), 0.1, seed)
        assert [len(training), len(validation)] == [3, 2]


@pytest.mark.parametrize("answers", [[1], [1, 1, 1]])
def test_equal_rows_cannot_be_divided(answers):
    with pytest.raises(ValueError, match=rf"at least two different rows; got {len(answers)} rows, 1 different"):
        split_rows(rows_of(answers), 0.5, 0)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_that_is_none_is_said(share):
    with pytest.raises(ValueError, match="`validation_share` must be between 0 and 1; got validation_share="):
        split_rows(rows_of([1, 2]), share, 0)


def test_rows_that_are_trained_on_are_counted():
    assert count_repeated(rows_of([1, 2, 2, 9]), rows_of([2, 1, 5])) == 3
    assert count_repeated(rows_of([7]), rows_of([2])) == 0
