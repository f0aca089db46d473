"""Fine-tuning a causal language model with a GraLoRA adapter, on TRL's SFTTrainer.

result = train(TrainingOptions(model="folder", data="rows.jsonl", output="my-adapter"))
"""

import math
import time
from collections import Counter
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gralora import pretrained
from gralora.checks import dtype_name
from gralora.export import rank_warning
from gralora.files.atomic import replacing_files
from gralora.optional import require
from gralora.recipe import model_card, resume
from gralora.recipe.data import EncodedRows, Row, check_prompts, encode, parse_rows, read_rows
from gralora.recipe.options import PACKAGED_TASK, TrainingOptions
from gralora.recipe.progress import Reporter, RunSummary, quiet_libraries
from gralora.recipe.result import TrainingResult
from gralora.recipe.resume import BaseScore, RunState
from gralora.recipe.run_folder import RunFolder, explaining_full_disk, write_json, write_loss_curve
from gralora.recipe.scoring import Score, score_exact_match
from gralora.recipe.steps import StepCallback
from gralora.recipe.tasks import support_rows
from gralora.tuner.layer import GraloraLayer, gralora_layers


def train(options: TrainingOptions, reporter: Reporter | None = None) -> TrainingResult:
    """Train an adapter and write its folder; `resume_run` continues an interrupted run.

    SIGINT and SIGTERM end the run after the current step and save everything; a second signal ends it at
    once.

    Args:
        options: What to train, on which rows, and how.
        reporter: Receives progress events; silent by default.

    Raises:
        ValueError: A bad option, or bad rows.
        FileNotFoundError: A file or the model does not exist.
        ImportError: A library is missing; the message has the command that installs it.
        RuntimeError: The loss is not finite, `output` cannot be written, or the disk is full.
    """
    _require_libraries()
    folder = RunFolder(options.output)
    if reason := folder.new_run_refusal():
        raise ValueError(reason)
    return _carry_out(options, folder, None, reporter or Reporter())


def resume_run(output: str, given: dict[str, Any] | None = None, reporter: Reporter | None = None) -> TrainingResult:
    """Continue the interrupted run in the folder `output`, with its options.

    Args:
        output: Folder of the run.
        given: Options by name; they must be those of the run, except `threads`.
        reporter: Receives progress events; silent by default.

    Raises:
        ValueError: There is no run, an option differs from the run's, or the rows have changed.
        FileNotFoundError: A file or the model does not exist.
        ImportError: A library is missing; the message has the command that installs it.
        RuntimeError: The loss is not finite, `output` cannot be written, or the disk is full.
    """
    _require_libraries()
    given = given or {}
    state = RunState.read(output)
    if reason := state.options_refusal(given):
        raise ValueError(reason)
    options = state.options_for(output, given.get("threads"))
    return _carry_out(options, RunFolder(output), state, reporter or Reporter())


def _require_libraries() -> None:
    require("trl", "datasets", "matplotlib", extra="train")


def _carry_out(
    options: TrainingOptions, folder: RunFolder, state: RunState | None, reporter: Reporter
) -> TrainingResult:
    started = time.perf_counter()
    folder.prepare()
    if options.threads:
        torch.set_num_threads(options.threads)
    with quiet_libraries(reporter), explaining_full_disk(folder.path):
        return _Run(options, folder, state, reporter, started).carry_out()


class _Run:
    """One call of `train` or `resume_run`, and what its parts share."""

    def __init__(
        self,
        options: TrainingOptions,
        folder: RunFolder,
        resumed: RunState | None,
        reporter: Reporter,
        started: float,
    ) -> None:
        self.options = options
        self.folder = folder
        self.reporter = reporter
        self.started = started
        train_rows, self.eval_rows = _read_rows(options)
        dtype = pretrained.choose_dtype(options.dtype)
        reporter.note(f"loading {options.model}")
        source = pretrained.resolve(options.model, dtype)
        self.tokenizer = source.load_tokenizer()
        encoded = encode(train_rows, self.tokenizer, options.max_length, options.data or PACKAGED_TASK)
        check_prompts(self.eval_rows, self.tokenizer, options.eval or PACKAGED_TASK)
        if encoded.earlier_answers_ignored:
            reporter.note(
                "note: the chat template does not mark the assistant's tokens, so only the last answer of each "
                "conversation is learned."
            )
        self.state = _state(options, resumed, encoded.fingerprint())
        self.checkpoint = resume.last_checkpoint(folder) if resumed else None
        self.callback = StepCallback(reporter)
        self.trainer = self._trainer(source.load_model(dtype), encoded)
        self.model: Any = self.trainer.model
        reporter.ready(self._summary(encoded))

    def carry_out(self) -> TrainingResult:
        options, reporter, trainer, checkpoint = self.options, self.reporter, self.trainer, self.checkpoint
        total = trainer.args.max_steps
        if warning := rank_warning(options.k, options.r, options.hybrid_r):
            reporter.note(warning)

        self._score_base()
        if checkpoint and checkpoint.step >= total:
            resume.load_finished(trainer, checkpoint)
        else:
            with self.callback.interruptible():
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        before = self.state.before
        losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        result = TrainingResult(
            output=options.output,
            steps=trainer.state.global_step,
            total_steps=total,
            losses=losses,
            before=before.exact_match if before else None,
            after=None,
            example=None,
            tokens_per_second=self.callback.tokens_per_second(),
            seconds=time.perf_counter() - self.started,
        )
        self._write(result, adapter=True)
        if before and not result.interrupted:
            result = self._score_trained(result, before)
            self._write(result, adapter=False)
        return result

    def _trainer(self, model: Any, encoded: EncodedRows) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

        options = self.options
        total = options.total_steps(len(encoded.input_ids))
        arguments = SFTConfig(
            output_dir=str(self.folder.checkpoints),
            max_steps=total,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(total / 10),
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=max(1, min(200, math.ceil(total / 4))),
            save_total_limit=2,
            max_length=None,
            bf16=False,
            gradient_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            data_seed=options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        dataset = Dataset.from_dict({"input_ids": encoded.input_ids, "labels": encoded.labels})
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=self.tokenizer,
            peft_config=options.adapter_config(),
            callbacks=[self.callback],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _summary(self, encoded: EncodedRows) -> RunSummary:
        options = self.options
        layers = gralora_layers(self.model)
        trainable, everything = self.model.get_nb_trainable_parameters()
        return RunSummary(
            model=options.model,
            dtype=dtype_name(self.model.get_base_model().dtype),
            device=str(self.trainer.args.device),
            targets=dict(Counter(_target_name(name, layer) for name, layer in layers.items())),
            trainable_parameters=trainable,
            all_parameters=everything,
            r=options.r,
            hybrid_r=options.hybrid_r,
            k=options.k,
            scale=next(iter(layers.values())).scaling["default"],
            train_rows=len(encoded.input_ids),
            truncated_rows=encoded.truncated,
            eval_rows=len(self.eval_rows),
            steps=self.trainer.args.max_steps,
            first_step=self.checkpoint.step if self.checkpoint else 0,
            batch_size=options.batch_size,
        )

    def _score_base(self) -> None:
        """Measure the score before training, once per run, and store the state of the run."""
        if self.eval_rows and self.state.before is None:
            with self.model.disable_adapter():
                score = self._score("before")
            self.state = replace(self.state, before=BaseScore(score.exact_match, score.answers[0]))
        self.state.write(self.folder)

    def _score_trained(self, result: TrainingResult, before: BaseScore) -> TrainingResult:
        after = self._score("after")
        example = {
            "prompt": self.eval_rows[0].prompt[-1]["content"],
            "reference": self.eval_rows[0].completion,
            "before": before.first_answer,
            "after": after.answers[0],
        }
        seconds = time.perf_counter() - self.started
        return replace(result, after=after.exact_match, example=example, seconds=seconds)

    def _score(self, when: str) -> Score:
        rows = self.eval_rows
        self.reporter.scoring(when, 0, len(rows))
        # Scoring must not change the random numbers that training draws.
        with torch.random.fork_rng():
            return score_exact_match(
                self.model,
                self.tokenizer,
                rows,
                on_rows_done=lambda done: self.reporter.scoring(when, done, len(rows)),
            )

    def _write(self, result: TrainingResult, adapter: bool) -> None:
        metrics = {
            **{k: v for k, v in asdict(result).items() if k not in ("output", "losses", "before", "after")},
            "finished": not result.interrupted,
            "exact_match_before": result.before,
            "exact_match_after": result.after,
            "options": self.state.options,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("gralora", "torch", "transformers", "peft", "trl")},
            "losses": result.losses,
        }
        with replacing_files(self.folder.path) as partial:
            if adapter:
                self._save_adapter(partial)
            write_json(partial / "metrics.json", metrics)
            if result.losses:
                write_loss_curve(partial / "loss.png", list(result.losses))
            (partial / "README.md").write_text(model_card.render(self.options, result))

    def _save_adapter(self, path: Path) -> None:
        config = self.model.peft_config["default"]
        loaded_from = config.base_model_name_or_path
        config.base_model_name_or_path = self.options.model
        try:
            # Embeddings are never resized here; to find that out, PEFT would ask the hub for the base model.
            self.model.save_pretrained(path, save_embedding_layers=False)
        finally:
            config.base_model_name_or_path = loaded_from


def _state(options: TrainingOptions, resumed: RunState | None, data_sha256: str) -> RunState:
    if resumed is None:
        return RunState.start(options, data_sha256)
    if reason := resumed.data_refusal(options.data, data_sha256):
        raise ValueError(reason)
    return resumed


def _read_rows(options: TrainingOptions) -> tuple[list[Row], list[Row]]:
    if options.data is None:
        packaged = {
            split: [(f"row {i}", row) for i, row in enumerate(support_rows(split))] for split in ("train", "eval")
        }
        train_rows, eval_rows = (parse_rows(packaged[split], PACKAGED_TASK) for split in ("train", "eval"))
    else:
        train_rows, eval_rows = read_rows(options.data), []
    return train_rows, read_rows(options.eval, "eval") if options.eval else eval_rows


def _target_name(name: str, layer: GraloraLayer) -> str:
    """Return the last part of the name of an adapted weight; of a stack, with the module and the number of experts.

    Example: "experts.down_proj (8 experts each)".
    """
    parts = layer.weight_name(name).split(".")
    return f"{'.'.join(parts[-2:])} ({layer.experts[0]} experts each)" if layer.experts else parts[-1]
