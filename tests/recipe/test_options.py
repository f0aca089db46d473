import pytest

from gralora.recipe.options import PACKAGED_TASK_STEPS, TrainingOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be a positive integer; got steps=0"),
        ({"batch_size": True}, "`batch_size` must be a positive integer"),
        ({"lr": float("nan")}, "`lr` must be a finite positive number; got lr=nan"),
        ({"epochs": -1}, "`epochs` must be a finite positive number"),
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"dtype": "int8"}, "`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16'; got dtype='int8'"),
        ({"k": 3}, "`gralora_k` must divide `r`"),
        ({"dropout": 1.0}, "`gralora_dropout` must be in"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
        (
            {"target_modules": "("},
            "`target_modules` must be names or a regular expression; got target_modules='(': mis",
        ),
        ({"target_modules": "q_proj,"}, "got target_modules='q_proj,': a name is missing."),
        ({"model": ""}, "`model` must be text"),
    ],
)
def test_a_wrong_value_is_said(changes, message):
    with pytest.raises(ValueError, match=r"must be|must divide") as error:
        TrainingOptions(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [
        ({}, 640, PACKAGED_TASK_STEPS),
        ({"epochs": 1}, 640, 80),
        ({"data": "rows.jsonl"}, 17, 9),
        ({"data": "rows.jsonl", "epochs": 0.01}, 17, 1),
        ({"data": "rows.jsonl", "steps": 5}, 17, 5),
    ],
)
def test_steps_follow_from_the_rows(changes, rows, steps):
    assert TrainingOptions(**changes).total_steps(rows) == steps


@pytest.mark.parametrize("name", ["batch_size", "lr", "seed", "target_modules"])
def test_an_option_that_has_a_value_is_never_none(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*; got {name}=None"):
        TrainingOptions(**{name: None})
