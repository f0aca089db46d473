import pytest
from conftest import native_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from gralora.tuner.exact_targets import exact_targets


def matched(targets, names):
    """What plain PEFT chooses."""
    with native_peft() as config:
        return {name for name in names if check_target_module_exists(config(target_modules=targets), name)}


@pytest.mark.parametrize(
    ("chosen", "others", "expected"),
    [
        (["l.0.q", "l.1.q"], ["l.0.k", "l.0", "l.1"], {"q"}),
        (["a.q", "b.q"], ["c.q"], {"a.q", "b.q"}),
        (["out_proj"], ["attn.out_proj"], "out_proj"),
        (["out_proj", "l.0.q"], ["attn.out_proj", "l.0"], r"(.*\.)?(q)|out_proj"),
        (["a+b"], ["x.a+b"], r"a\+b"),
    ],
)
def test_short_names_where_they_are_exact(chosen, others, expected):
    targets = exact_targets(chosen, others)
    assert targets == expected
    assert matched(targets, [*chosen, *others]) == set(chosen)


part = st.sampled_from(["a", "b", "q", "0", "a+b"])
name = st.lists(part, min_size=1, max_size=3).map(".".join)


@given(st.sets(name, min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_plain_peft_matches_what_was_chosen(names, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(names)), min_size=1))
    assert matched(exact_targets(chosen, names - chosen), names) == chosen
