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
        ({"warmup": -0.1}, "`warmup` must be a share from 0 to 1 or a whole number of steps; got warmup=-0.1."),
        ({"warmup": 2.5}, "`warmup` must be a share"),
        ({"weight_decay": -1}, "`weight_decay` must be zero or a finite positive number"),
        ({"validation_share": 1}, "`validation_share` must be between 0 and 1"),
        ({"load_in": "2bit"}, "`load_in` must be 4bit or 8bit; got load_in='2bit'."),
        ({"train_on": "answers"}, "`train_on` must be all-answers, last-answer or everything"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be no, bf16 or fp16"),
        ({"log_to": ("tensorbord",)}, "`log_to` must be tensorboard, wandb or mlflow; got log_to='tensorbord'."),
        ({"eval": "rows.jsonl"}, "`eval` must come with `data`"),
        ({"eval_data": "rows.jsonl"}, "`eval_data` must come with `data`"),
        ({"data": "a", "eval_data": "b", "validation_share": 0.1}, "`eval_data` or `validation_share` must be given"),
        ({"keep_best": True}, "`keep_best` must come with `eval_data` or `validation_share`"),
        ({"patience": 2}, "`patience` must come with `eval_data` or `validation_share`"),
        ({"data": "a", "eval_steps": 2}, "`eval_steps` must come with"),
        ({"validation_share": 0.1, "keep_best": True, "save_steps": 3}, "`save_steps` must be left out"),
        ({"layers_to_transform": "1-x"}, "`layers_to_transform` must be numbers and ranges"),
        ({"layers_to_transform": "3-1"}, "`layers_to_transform` must be numbers and ranges"),
        ({"rank_pattern": ("q_proj",)}, "`rank_pattern` must be NAME=NUMBER; got rank_pattern='q_proj'."),
        ({"k_pattern": ("q_proj=x",)}, "`k_pattern` must be NAME=NUMBER"),
        ({"adapter": {"r": 3}}, "`adapter` must hold fields of GraloraConfig that have no option; got 'r'. Use `r`."),
        ({"adapter": {"gralora_k": 3}}, "got 'gralora_k'. Use `k`."),
        ({"adapter": {"init_wieghts": False}}, "got 'init_wieghts'. Nearest: 'init_weights'."),
        ({"adapter": {"peft_type": "LORA"}}, "`adapter` must hold fields"),
    ],
)
def test_a_wrong_value_is_said(changes, message):
    with pytest.raises(ValueError, match="must") as error:
        TrainingOptions(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "steps"),
    [
        ({}, 80, PACKAGED_TASK_STEPS),
        ({"epochs": 1}, 80, 80),
        ({"data": "rows.jsonl"}, 3, 9),
        ({"data": "rows.jsonl", "epochs": 0.01}, 3, 1),
        ({"data": "rows.jsonl", "epochs": 1.5}, 3, 5),
        ({"data": "rows.jsonl", "steps": 5}, 3, 5),
    ],
)
def test_steps_follow_from_those_of_an_epoch(changes, steps_per_epoch, steps):
    assert TrainingOptions(**changes).total_steps(steps_per_epoch) == steps


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0.1, 40, 4), (0.1, 1, 1), (0, 40, 0), (7, 40, 7), (1, 40, 1), (0.25, 10, 3)]
)
def test_a_warmup_is_a_share_or_a_number_of_steps(warmup, total, steps):
    assert TrainingOptions(warmup=warmup).warmup_steps(total) == steps


@pytest.mark.parametrize("name", ["batch_size", "lr", "seed", "output"])
def test_an_option_that_has_a_value_is_never_none(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*; got {name}=None"):
        TrainingOptions(**{name: None})


@pytest.mark.parametrize(("changes", "alpha"), [({"r": 8}, 16), ({"r": 32, "hybrid_r": 16}, 96), ({"alpha": 5}, 5)])
def test_alpha_keeps_the_scale_at_two(changes, alpha):
    assert TrainingOptions(**changes).adapter_config().alpha == alpha


def test_short_names_of_dtypes():
    assert [TrainingOptions(dtype=name).dtype for name in ("bf16", "fp16", "fp32", "auto")] == [
        "bfloat16",
        "float16",
        "float32",
        "auto",
    ]


def test_the_config_has_what_the_options_say():
    config = TrainingOptions(
        target_modules="q_proj,down_proj",
        exclude_modules="lm_head",
        layers_to_transform="0,2-3",
        rank_pattern=("q_proj=8", r".*\.down=proj=16"),
        alpha_pattern=("q_proj=0.5",),
        k_pattern=("q_proj=4",),
        modules_to_save="score",
        use_rslora=True,
        bias="gralora_only",
        adapter={"ensure_weight_tying": True},
    ).adapter_config()
    assert config.target_modules == {"q_proj", "down_proj"}
    assert config.exclude_modules == {"lm_head"}
    assert config.layers_to_transform == [0, 2, 3]
    assert config.rank_pattern == {"q_proj": 8, r".*\.down=proj": 16}
    assert (config.alpha_pattern, config.k_pattern) == ({"q_proj": 0.5}, {"q_proj": 4})
    assert config.modules_to_save == ["score"]
    assert (config.use_rslora, config.bias, config.ensure_weight_tying) == (True, "gralora_only", True)


def test_what_the_adapter_to_start_from_brings_is_not_given_twice():
    with pytest.raises(ValueError, match="`r` must be left out with `start_from`"):
        TrainingOptions(start_from="somewhere", r=8)
    options = TrainingOptions(start_from="somewhere", model="its base")
    assert (options.r, options.k, options.alpha) == (None, None, None)
