"""The arguments of TRL's trainer, made from the options of a run."""

import difflib
import importlib.util
import math
import re
from dataclasses import fields
from typing import Any

from gralora.recipe.options import TrainingOptions

# Fields of SFTConfig that an option of ours sets.
_OWNED = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accumulation",
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "weight_decay": "weight_decay",
    "optim": "optimizer",
    "packing": "packing",
    "max_length": "max_length",
    "truncation_mode": "max_length",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "do_eval": "eval_data",
    "eval_strategy": "eval_steps",
    "eval_steps": "eval_steps",
    "save_strategy": "save_steps",
    "save_steps": "save_steps",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "keep_best",
    "greater_is_better": "keep_best",
    "report_to": "log_to",
    "push_to_hub": "push_to_hub",
    "hub_model_id": "push_to_hub",
    "resume_from_checkpoint": "resume",
    "assistant_only_loss": "train_on",
    "completion_only_loss": "train_on",
    "dataset_text_field": "data",
    "model_init_kwargs": "model",
}
# Fields that have no effect here, or would break what a run promises.
_UNUSED = {
    "do_train": "a run always trains",
    "do_predict": "`eval` scores held-out rows",
    "logging_steps": "the loss of every step is logged",
    "logging_strategy": "the loss of every step is logged",
    "logging_first_step": "the loss of every step is logged",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "disable_tqdm": "gralora shows the progress itself",
    "dataset_kwargs": "gralora encodes the rows itself",
    "chat_template_path": "the tokenizer of the model holds the chat template",
    "eos_token": "the tokenizer of the model holds it",
    "remove_unused_columns": "gralora encodes the rows itself",
    "label_names": "gralora encodes the rows itself",
    "prediction_loss_only": "only the loss is measured",
    "auto_find_batch_size": "a resumed run would not repeat it",
    "ignore_data_skip": "a resumed run would see other rows",
    "save_only_model": "a run could not be resumed",
    "restore_callback_states_from_checkpoint": "gralora sets it",
    "enable_jit_checkpoint": "a signal saves the run without it",
    "trust_remote_code": "code of a model is not run",
    "dataset_num_proc": "gralora encodes the rows itself",
    "include_for_metrics": "only the loss is measured",
    "batch_eval_metrics": "only the loss is measured",
    **dict.fromkeys(
        ("hub_private_repo", "hub_token", "hub_strategy", "hub_always_push", "hub_revision"),
        "the adapter is uploaded once, at the end; for a private repository, make it on the hub first",
    ),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "ddp_backend", "ddp_timeout", "local_rank"),
        "accelerate's configuration says how several processes train",
    ),
}

# Types of fields that take numbers only, as annotations spell them: "<class 'int'>" and "float | None".
_NUMBERS = {"class", "int", "float", "None"}
_TYPE_NAME = re.compile(r"\w+")
# Names by which other tools and papers call an optimizer.
_COMMON_NAMES = {
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
}


def trainer_refusal(options: TrainingOptions) -> str | None:
    """Return which field of `options.trainer` cannot be set, with the way out, or None."""
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    known = {field.name for field in fields(SFTConfig)}
    for name in options.trainer:
        if name in _OWNED:
            return f"`trainer` must hold fields that have no option; got {name!r}. Use `{_OWNED[name]}`."
        if name in _UNUSED:
            return f"`trainer` must hold fields that have an effect; got {name!r}: {_UNUSED[name]}."
        if name not in known:
            near = difflib.get_close_matches(str(name), {*known, *_OWNED}, n=1)
            hint = f"Nearest: {near[0]!r}." if near else "TRL documents them."
            if near and near[0] in _OWNED:
                hint = f"Nearest: {near[0]!r}, for which there is `{_OWNED[near[0]]}`."
            return f"`trainer` must hold fields of TRL's SFTConfig; got {name!r}. {hint}"
    return _choice_refusal("scheduler", options.scheduler) or _choice_refusal("optimizer", options.optimizer)


def _choice_refusal(name: str, value: str) -> str | None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    known = [choice.value for choice in (SchedulerType if name == "scheduler" else OptimizerNames)]
    if value in known:
        return None
    near = [_COMMON_NAMES[value]] if value in _COMMON_NAMES else difflib.get_close_matches(value, known, n=1)
    hint = f"Nearest: {near[0]!r}." if near else f"They are {', '.join(known)}."
    return f"`{name}` must be one of transformers'; got {name}={value!r}. {hint}"


def require_trackers(options: TrainingOptions) -> None:
    """Check that the libraries of `log_to` are installed.

    Raises:
        ImportError: One is not; the message has the command that installs it.
    """
    for tracker in options.log_to:
        if importlib.util.find_spec(tracker) is None:
            raise ImportError(f"`log_to={tracker}` needs {tracker}, which is not installed. Run: pip install {tracker}")


def make_arguments(options: TrainingOptions, folder: str, has_validation: bool, several_processes: bool = False) -> Any:
    """Return TRL's `SFTConfig` for a run; `set_length` completes it once the number of steps is known.

    Args:
        options: Options of the run.
        folder: Folder for checkpoints.
        has_validation: Whether a loss is measured during training.
        several_processes: Whether `Processes` has connected several, whose state the Trainer then shares.

    Raises:
        ValueError: TRL or transformers refuse a field of `trainer`.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import patch_environment
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    settings: dict[str, Any] = {
        "per_device_eval_batch_size": options.batch_size,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "run_name": options.output,
        **_converted(options.trainer, SFTConfig),
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.grad_accumulation,
        "learning_rate": options.lr,
        "lr_scheduler_type": options.scheduler,
        "weight_decay": options.weight_decay,
        "optim": options.optimizer,
        "packing": options.packing,
        "max_length": options.max_length if options.packing else None,
        "gradient_checkpointing": options.gradient_checkpointing,
        "seed": options.seed,
        "data_seed": options.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": 1 if has_validation else None,
        "prediction_loss_only": True,
        "load_best_model_at_end": options.keeps_best,
        "metric_for_best_model": "eval_loss" if options.keeps_best else None,
        "greater_is_better": False if options.keeps_best else None,
        "restore_callback_states_from_checkpoint": bool(options.patience),
        "disable_tqdm": True,
        "report_to": list(options.log_to) or "none",
        # None would let TRL choose bfloat16.
        "bf16": options.mixed_precision == "bf16",
        "fp16": options.mixed_precision == "fp16",
    }
    device: Any = PartialState().device
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("`mixed_precision=fp16` needs a GPU; on a CPU it would change nothing. Use bf16 or no.")
    if options.mixed_precision == "bf16" and not several_processes and device.type == "cpu":
        settings.setdefault("use_cpu", True)  # transformers refuses bfloat16 on a CPU that it was not told to use
    if several_processes:
        given = options.trainer.get("accelerator_config") or {}
        settings["accelerator_config"] = {**given, "use_configured_state": True}
    # Else accelerate's launcher would decide, by this variable.
    precision = {"ACCELERATE_MIXED_PRECISION": options.mixed_precision} if options.mixed_precision else {}
    try:
        with patch_environment(**precision):
            return SFTConfig(**settings)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise ValueError(f"`trainer` and the options must suit transformers; it refuses them: {error}") from error


def set_length(arguments: Any, options: TrainingOptions, total: int) -> None:
    """Set what depends on the number of steps `total`: warm-up, evaluations and checkpoints."""
    arguments.max_steps = total
    arguments.warmup_steps = options.warmup_steps(total)
    arguments.save_steps = options.save_steps or max(1, min(200, math.ceil(total / 4)))
    if arguments.eval_strategy != "no":
        arguments.eval_steps = options.eval_steps or max(1, total // 10)
    if options.keeps_best:
        # The best adapter is one of the checkpoints: so there is one at every evaluation.
        arguments.save_steps = arguments.eval_steps


def _converted(settings: dict[str, Any], config: type) -> dict[str, Any]:
    """Return `settings` with numbers where YAML reads text, such as 1e-4."""
    floats = {field.name for field in fields(config) if "float" in str(field.type)}
    numbers = {field.name for field in fields(config) if set(_TYPE_NAME.findall(str(field.type))) <= _NUMBERS}
    converted = dict(settings)
    for name, value in settings.items():
        if name in floats and isinstance(value, str) and _is_float(value):
            converted[name] = float(value)
        elif name in numbers and isinstance(value, str):
            raise ValueError(f"`trainer` must have a number for {name}; got {value!r}.")
    return converted


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
