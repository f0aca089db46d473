import os

import pytest
from runs import Recorder

from gralora.recipe.arguments import make_arguments, set_length, trainer_refusal
from gralora.recipe.options import TrainingOptions
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_grad_nrom": 1}, "got 'max_grad_nrom'. Nearest: 'max_grad_norm'."),
        ({"learning_rat": 1}, "Nearest: 'learning_rate', for which there is `lr`."),
        ({"output_dir": "x"}, "got 'output_dir'. Use `output`."),
        ({"per_device_train_batch_size": 2}, "Use `batch_size`."),
        ({"logging_steps": 5}, "got 'logging_steps': the loss of every step is logged."),
        ({"hub_private_repo": True}, "for a private repository, make it on the hub first."),
        ({"fsdp": "full_shard"}, "got 'fsdp': accelerate's configuration"),
        ({"zzz": 1}, "got 'zzz'. TRL documents them."),
    ],
)
def test_a_field_that_is_unknown_or_ours_is_refused_with_the_way_out(fields, message):
    assert message in trainer_refusal(TrainingOptions(trainer=fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "got optimizer='adam'. Nearest: 'adamw_torch'."),
        ({"optimizer": "adamw"}, "Nearest: 'adamw_torch'."),
        ({"scheduler": "cosin"}, "got scheduler='cosin'. Nearest: 'cosine'."),
    ],
)
def test_a_schedule_or_optimizer_that_transformers_lacks_is_refused(changes, message):
    assert message in trainer_refusal(TrainingOptions(**changes))


def test_every_other_field_reaches_the_trainer(tmp_path):
    fields = {"max_grad_norm": 0.5, "adam_beta2": "0.95", "neftune_noise_alpha": 5, "dataloader_num_workers": 1}
    arguments = make_arguments(TrainingOptions(trainer=fields), str(tmp_path), has_validation=False)
    assert (arguments.max_grad_norm, arguments.adam_beta2) == (0.5, 0.95)
    assert (arguments.neftune_noise_alpha, arguments.dataloader_num_workers) == (5, 1)


@pytest.mark.parametrize(("chosen", "taken"), [(None, "bf16"), ("no", "no"), ("bf16", "bf16")])
def test_the_option_for_mixed_precision_precedes_accelerates_configuration(chosen, taken, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = TrainingOptions(mixed_precision=chosen)
    assert make_arguments(options, str(tmp_path), has_validation=False).mixed_precision == taken
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_value_that_transformers_refuses_is_one_line(options):
    with pytest.raises(ValueError, match=r"`trainer` and the options must suit transformers; it refuses them: .*0to1"):
        train(options(trainer={"torch_compile_mode": "fast", "accelerator_config": "0to1.json"}))


def test_text_for_a_number_is_refused_before_the_model_is_loaded(options):
    with pytest.raises(ValueError, match=r"`trainer` must have a number for max_grad_norm; got 'lots'\."):
        train(options(trainer={"max_grad_norm": "lots"}))


def test_half_precision_without_a_gpu_is_refused(options):
    with pytest.raises(ValueError, match=r"`mixed_precision=fp16` needs a GPU"):
        train(options(mixed_precision="fp16"))


def test_the_length_of_a_run_decides_about_warmup_evaluations_and_checkpoints(tmp_path):
    options = TrainingOptions(validation_share=0.1)
    arguments = make_arguments(options, str(tmp_path), has_validation=True)
    set_length(arguments, options, 40)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.eval_steps, arguments.save_steps) == (40, 4, 4, 10)
    options = TrainingOptions(validation_share=0.1, keep_best=True, eval_steps=3)
    arguments = make_arguments(options, str(tmp_path), has_validation=True)
    set_length(arguments, options, 40)
    assert (arguments.eval_steps, arguments.save_steps, arguments.load_best_model_at_end) == (3, 3, True)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises(ImportError, match=r"`log_to=wandb` needs wandb, .* Run: pip install wandb"):
        train(TrainingOptions(log_to="wandb", model="./nowhere"), Recorder())
