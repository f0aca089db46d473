"""TRL's SFTTrainer, as a run uses it."""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from gralora.recipe.arguments import set_length
from gralora.recipe.data import EncodedRows
from gralora.recipe.options import TrainingOptions


class RowsTrainer(SFTTrainer):
    """SFTTrainer whose first step moves, and whose evaluations leave the training as it is."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of transformers without its first value, which is 0 where there is a warm-up."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        if isinstance(scheduler, LambdaLR):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # no step of the optimizer came before
                scheduler.step()
        return scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the loss without taking random numbers away from training."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)


def make_trainer(
    options: TrainingOptions,
    arguments: Any,
    model: Any,
    tokenizer: Any,
    train_rows: EncodedRows,
    validation_rows: EncodedRows | None,
    callbacks: Sequence[Any],
) -> RowsTrainer:
    """Return a trainer with the adapter on `model`, ready to train.

    Args:
        options: Options of the run.
        arguments: The `SFTConfig` from `make_arguments`; its length is set here.
        model: Base model.
        tokenizer: Its tokenizer.
        train_rows: Rows to train on.
        validation_rows: Rows whose loss is measured during training.
        callbacks: Callbacks of the run.
    """
    config = options.adapter_config()
    _require_modules(model, config.modules_to_save or ())
    if options.patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(options.patience)]
    trainer = RowsTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(validation_rows) if validation_rows else None,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if getattr(model, "is_quantized", False):
        for parameter in trainer.model.parameters():  # pyright: ignore[reportOptionalMemberAccess]
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL makes them bfloat16
    batches = len(trainer.get_train_dataloader())
    steps = -(-batches // options.grad_accumulation)
    set_length(arguments, options, options.total_steps(steps))
    return trainer


def _require_modules(model: Any, names: Sequence[str]) -> None:
    """Check that each of `modules_to_save` names a module; PEFT ignores one that does not."""
    modules = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        if not any(name.endswith(wanted) for name in modules):
            last = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(wanted.rpartition(".")[2], last, n=1)
            hint = f" Nearest: {near[0]!r}." if near else ""
            raise ValueError(f"`modules_to_save` must name modules of the model; none is called {wanted!r}.{hint}")


def _dataset(rows: EncodedRows) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows.input_ids, "labels": rows.labels})
