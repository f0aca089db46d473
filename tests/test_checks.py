import math

import pytest
import torch

from gralora.checks import dtype_name, dtype_named, is_number, require_integer, require_positive, require_text


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_a_positive_integer_is_required(value):
    require_integer("r", 1)
    with pytest.raises(ValueError, match=r"`r` must be a positive integer; got r="):
        require_integer("r", value)


@pytest.mark.parametrize(
    ("limits", "value", "rule"),
    [
        ({"minimum": 0}, -1, "zero or a positive integer"),
        ({"minimum": 2}, 1, "an integer of at least 2"),
        ({"minimum": 0, "maximum": 3}, 4, "an integer from 0 to 3"),
        ({"minimum": -3, "maximum": 0}, 1, "an integer from -3 to 0"),
    ],
)
def test_an_integer_has_limits(limits, value, rule):
    for limit in limits.values():
        require_integer("n", limit, **limits)
    with pytest.raises(ValueError, match=f"`n` must be {rule}; got n={value}"):
        require_integer("n", value, **limits)


@pytest.mark.parametrize("value", [0, -0.5, math.inf, math.nan, True, "1", None])
def test_a_positive_number_is_required(value):
    require_positive("lr", 1e-4)
    require_positive("lr", 10**400)
    with pytest.raises(ValueError, match=r"`lr` must be a finite positive number; got lr="):
        require_positive("lr", value)


@pytest.mark.parametrize("value", ["", None, 1])
def test_text_is_required(value):
    require_text("model", "a")
    with pytest.raises(ValueError, match=r"`model` must be text; got model="):
        require_text("model", value)


def test_a_bool_is_not_a_number():
    assert [is_number(value) for value in (1, 1.5, True, "1")] == [True, True, False, False]


def test_dtypes_by_name():
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_named("bfloat16") is torch.bfloat16
    assert dtype_named("auto", auto=torch.float16) is torch.float16
    with pytest.raises(ValueError, match="`dtype` must be 'float32', 'bfloat16' or 'float16'; got dtype='auto'"):
        dtype_named("auto")
    with pytest.raises(ValueError, match="`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16'; got dtype='i8'"):
        dtype_named("i8", auto=torch.float32)
