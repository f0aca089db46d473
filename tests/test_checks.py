import math
import subprocess
import sys

import pytest
import torch

from gralora.checks import (
    dtype_name,
    dtype_named,
    full_dtype_name,
    is_number,
    require_integer,
    require_positive,
    require_text,
)


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


@pytest.mark.parametrize(
    ("short", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("float", torch.float32),
    ],
)
def test_short_names_of_dtypes(short, dtype):
    assert dtype_named(short) is dtype
    assert full_dtype_name(short) == dtype_name(dtype)
    assert full_dtype_name("auto", allow_auto=True) == "auto"


def test_checking_the_name_of_a_dtype_does_not_import_torch():
    script = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('checks', sys.argv[1]); "
        "checks = importlib.util.module_from_spec(spec); spec.loader.exec_module(checks); "
        "checks.full_dtype_name('bf16'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, sys.modules["gralora.checks"].__file__]).returncode == 0
