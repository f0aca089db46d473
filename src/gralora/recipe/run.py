"""One run from its rows to its files: what `training` begins, in every process."""

import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gralora import pretrained
from gralora.checks import dtype_name
from gralora.export import rank_warning
from gralora.files.atomic import replacing_files
from gralora.recipe import hub, model_card, resume
from gralora.recipe.answering.decoding import generate_ids
from gralora.recipe.answering.scoring import Score, score_exact_match
from gralora.recipe.data import (
    EncodedRows,
    Row,
    Rows,
    check_prompts,
    count_repeated,
    encode,
    encode_prompt,
    parse_rows,
    read_rows,
    split_rows,
)
from gralora.recipe.options import PACKAGED_TASK, TrainingOptions
from gralora.recipe.processes import Processes
from gralora.recipe.progress import Reporter, RunSummary
from gralora.recipe.result import TrainingResult
from gralora.recipe.resume import BaseScore, RunState, stored_options
from gralora.recipe.run_folder import RunFolder, write_json, write_loss_curve
from gralora.recipe.saving import save_checked, trained_tensors
from gralora.recipe.signals import Signals
from gralora.recipe.tasks import support_rows
from gralora.tuner.layer import GraloraLayer, gralora_layers

_SAMPLE_TOKENS = 64
# Fields of a result that metrics.json has under another name, or at its end.
_APART = ("output", "losses", "eval_losses", "before", "after")


class Run:
    """One call of `train`, `resume_run` or `dry_run`, and what its parts share."""

    trainer: Any
    tokenizer: Any
    state: RunState

    def __init__(
        self,
        options: TrainingOptions,
        folder: RunFolder,
        resumed: RunState | None,
        reporter: Reporter,
        signals: Signals,
        processes: Processes,
    ) -> None:
        self.options = options
        self.folder = folder
        self.resumed = resumed
        self.reporter = reporter
        self.signals = signals
        self.processes = processes
        self.started = time.perf_counter()
        self.checkpoint: resume.Checkpoint | None = None

    def load(self) -> None:
        """Read the rows, load the model, and make the trainer."""
        from accelerate.utils import patch_environment

        from gralora.recipe.arguments import make_arguments
        from gralora.recipe.steps import SampleCallback, StepCallback
        from gralora.recipe.trainer import make_trainer

        reporter, processes = self.reporter, self.processes
        train_rows, validation_rows, self.eval_rows = processes.from_main(self._read_rows)
        reporter.note(f"loading {self.options.model}")
        dtype = pretrained.choose_dtype(self._dtype())
        source = processes.one_per_node_first(lambda: pretrained.resolve(self.options.model, dtype))
        processes.together(lambda: self._encode_all(source, train_rows, validation_rows))
        self.state, self.checkpoint, self.more_steps = processes.from_main(self._start_or_resume)
        processes.together(self._require_checkpoint)
        self.options = options = replace(self.options, grad_accumulation=self.state.accumulation(processes))
        # Made before the model: where the processes share it, it is loaded in parts.
        arguments = make_arguments(
            options, str(self.folder.checkpoints), bool(validation_rows), several_processes=processes.count > 1
        )
        self.callback = StepCallback(reporter, self.signals, processes)
        callbacks: list[Any] = [self.callback]
        if options.sample_every:
            callbacks.append(SampleCallback(options.sample_every, self._sample, reporter))
        # The Trainer reads it when it is made.
        logs = {"TENSORBOARD_LOGGING_DIR": str(self.folder.logs)} if "tensorboard" in options.log_to else {}

        def load() -> None:
            model = source.load_model(
                dtype, load_in=options.load_in, attention=options.attention, allow_missing=options.allow_missing
            )
            with patch_environment(**logs):
                self.trainer = make_trainer(
                    options, arguments, model, self.tokenizer, self.encoded, self.validation, callbacks
                )
            if options.start_from:
                pretrained.fill_adapter(self.model, options.start_from)

        if processes.share_model:
            load()  # the processes exchange parts of it, so that one that fails must end at once
        else:
            processes.together(load)

    def _dtype(self) -> str:
        """Return the dtype of the base model: autocast keeps it in float32, unless the user chose another one."""
        options = self.options
        autocast = options.mixed_precision in ("bf16", "fp16") and not options.load_in
        return "float32" if autocast and options.dtype == "auto" else options.dtype

    @property
    def model(self) -> Any:
        """The model with the adapter, which the Trainer wraps when the training begins."""
        return self.trainer.model

    def _encode_all(self, source: Any, train_rows: Sequence[Row], validation_rows: Sequence[Row]) -> None:
        options = self.options
        self.tokenizer = source.load_tokenizer(options.start_from)
        self.encoded = self._encode(train_rows, options.data)
        self.validation = self._encode(validation_rows, options.eval_data) if validation_rows else None
        check_prompts(self.eval_rows, self.tokenizer, options.eval or PACKAGED_TASK)
        self.sampled_row = self._row_to_sample(self.eval_rows or validation_rows or train_rows)

    def _require_checkpoint(self) -> None:
        if self.checkpoint and not (self.checkpoint.path / "trainer_state.json").is_file():
            raise ValueError(
                f"`output` must be a folder that every process sees; there is no {str(self.checkpoint.path)!r} on "
                f"{socket.gethostname()}. Name a folder that the machines share."
            )

    def carry_out(self) -> TrainingResult:
        """Train, and write the adapter and what belongs to it."""
        from gralora.recipe.steps import BeginCallback

        options, reporter, trainer, checkpoint = self.options, self.reporter, self.trainer, self.checkpoint
        total = trainer.args.max_steps
        if checkpoint and checkpoint.step > total:
            raise ValueError(f"`steps` must be at least the {checkpoint.step} that the run has done; got {total}.")
        summary = self.summary()
        self.global_batch = summary.global_batch
        reporter.ready(summary)
        config = self.model.peft_config["default"]
        if warning := rank_warning(config.gralora_k, config.r, config.hybrid_r):
            reporter.note(warning)
        self._store()
        if self.processes.share_model:
            trainer.add_callback(BeginCallback(self._score_base))  # before, a process has too much of the model
        else:
            self._score_base()
        if checkpoint:
            self.processes.from_main(lambda: resume.find_best_again(checkpoint))
        with self.signals.after_the_step():
            if checkpoint and (checkpoint.step >= total or self._ended_early()):
                resume.load_finished(trainer, checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        result = self._result(total)
        if result.stopped_early != self.state.stopped_early:
            self._store(stopped_early=result.stopped_early)
        self._write(result, adapter=True)
        if self.state.before and not self.signals.stopping:
            result = self._score_trained(result, self.state.before)
            self._write(result, adapter=False)
        if options.push_to_hub and not result.interrupted:
            address = self.processes.from_main(lambda: hub.upload(self.folder.path, str(options.push_to_hub)))
            reporter.note(f"uploaded to {address}")
        return result

    def _store(self, **changes: Any) -> None:
        """Write the state of the run, changed."""
        self.state = replace(self.state, **changes)
        self.processes.from_main(lambda: self.state.write(self.folder))

    def summary(self) -> RunSummary:
        """Return the facts of the run."""
        options = self.options
        layers = gralora_layers(self.model)
        trainable, everything = self.model.get_nb_trainable_parameters()
        config = self.model.peft_config["default"]
        return RunSummary(
            model=options.model,
            dtype=_base_dtype(self.model, options),
            device=self.trainer.args.device.type,
            targets=dict(Counter(_target_name(name, layer) for name, layer in layers.items())),
            trainable_parameters=trainable,
            all_parameters=everything,
            r=config.r,
            hybrid_r=config.hybrid_r,
            k=config.gralora_k,
            scale=next(iter(layers.values())).scaling["default"],
            train_rows=len(self.encoded.input_ids),
            truncated_rows=self.encoded.truncated,
            eval_rows=len(self.eval_rows),
            validation_rows=len(self.validation.input_ids) if self.validation else 0,
            steps=self.trainer.args.max_steps,
            first_step=self.checkpoint.step if self.checkpoint else 0,
            batch_size=options.batch_size,
            grad_accumulation=options.grad_accumulation,
            processes=self.processes.count,
        )

    def _read_rows(self) -> tuple[Sequence[Row], Sequence[Row], Sequence[Row]]:
        """Return the rows to train on, those for the evaluation loss, and those to score."""
        options = self.options
        if not options.data:
            train_rows, eval_rows = (_packaged_rows(split) for split in ("train", "eval"))
            validation_rows: Sequence[Row] = eval_rows
        else:
            train_rows = self._read(options.data, "data")
            validation_rows = self._read(options.eval_data, "eval_data")
            eval_rows = self._read(options.eval, "eval")
            for measure, rows in (("evaluation loss", validation_rows), ("exact match", eval_rows)):
                if repeated := count_repeated(rows, train_rows):
                    self.reporter.note(
                        f"note: {repeated} of the {len(rows)} rows for the {measure} are trained on as well; it says "
                        f"nothing about them"
                    )
        if options.validation_share is not None:
            train_rows, validation_rows = split_rows(train_rows, options.validation_share, options.seed)
        return train_rows, validation_rows, eval_rows

    def _read(self, sources: tuple[str, ...], option: str) -> Rows:
        rows = read_rows(sources, option) if sources else Rows(())
        for note in rows.notes:
            self.reporter.note(f"note: {note}")
        return rows

    def _encode(self, rows: Sequence[Row], source: tuple[str, ...]) -> EncodedRows:
        options = self.options
        encoded = encode(rows, self.tokenizer, options.max_length, source or PACKAGED_TASK, options.train_on)
        for note in encoded.notes:
            self.reporter.note(f"note: {note}")
        return encoded

    def _start_or_resume(self) -> tuple[RunState, resume.Checkpoint | None, bool]:
        """Return the state, the checkpoint to go on from, and whether more steps are asked for than before."""
        options, resumed, fingerprint = self.options, self.resumed, self.encoded.fingerprint()
        held_out = self._held_out_fingerprint()
        if resumed is None:
            return RunState.start(options, fingerprint, self.processes, held_out), None, False
        if reason := resumed.data_refusal(options.data, fingerprint, held_out):
            raise ValueError(reason)
        checkpoint, damaged = resume.last_checkpoint(self.folder)
        for problem in damaged:
            self.reporter.note(f"note: {problem}; the checkpoint is not used")
        if damaged:
            where = f"step {checkpoint.step}" if checkpoint else "the start"
            self.reporter.note(f"note: the run goes on from {where}")
        accumulation, count = resumed.accumulation(self.processes), self.processes.count
        if count != resumed.processes:
            self.reporter.note(
                f"note: the run began with {resumed.processes} and goes on with {count} processes; a step has as many "
                f"rows as before, since each accumulates {accumulation} of its batches"
            )
        kind, launch = self.processes.kind, self.processes.launch
        threads = options.threads or resumed.threads
        state = replace(resumed, options=stored_options(options), threads=threads, kind=kind, launch=launch)
        more_steps = any(state.options[name] != resumed.options.get(name) for name in ("steps", "epochs"))
        return state, checkpoint, more_steps

    def _held_out_fingerprint(self) -> str:
        rows = [[row.messages, row.tools] for row in self.eval_rows]
        validation = self.validation.fingerprint() if self.validation else None
        return hashlib.sha256(json.dumps([rows, validation], default=str).encode()).hexdigest()

    def _ended_early(self) -> bool:
        return self.state.stopped_early and not self.more_steps

    def _result(self, total: int) -> TrainingResult:
        state, before = self.trainer.state, self.state.before
        log = state.log_history
        best = state.best_global_step if self.options.keeps_best else None
        return TrainingResult(
            output=self.options.output,
            steps=state.global_step,
            total_steps=total,
            stopped_early=state.global_step < total and not self.signals.stopping,
            losses=tuple(entry["loss"] for entry in log if "loss" in entry),
            eval_losses=tuple((entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry),
            best_step=best or None,
            before=before.exact_match if before else None,
            after=None,
            example=None,
            tokens_per_second=self.callback.tokens_per_second(),
            seconds=time.perf_counter() - self.started,
        )

    def _row_to_sample(self, rows: Sequence[Row]) -> Row | None:
        row = next((row for row in rows if not row.is_text), None)
        if self.options.sample_every and row is None:
            raise ValueError("`sample_every` needs rows with an answer; these are plain text.")
        return row

    def _sample(self) -> tuple[str, str]:
        """Return the prompt of a row and the model's answer to it."""
        row: Any = self.sampled_row
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng():
                prompt = encode_prompt(row.prompt, row.is_plain, self.tokenizer, row.tools)
                share = self.processes.share_model
                ids = generate_ids(self.model, self.tokenizer, [prompt], _SAMPLE_TOKENS, in_step=share, do_sample=False)
        finally:
            self.model.train(was_training)
        return row.prompt[-1].get("content", ""), self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def _score_base(self) -> None:
        """Measure the score before training, once per run."""
        if self.eval_rows and self.state.before is None:
            with self.signals.at_once(), self.model.disable_adapter():
                score = self._score("before")
            self._store(before=BaseScore(score.exact_match, score.answers[0]))

    def _score_trained(self, result: TrainingResult, before: BaseScore) -> TrainingResult:
        after = self._score("after")
        example = {
            "prompt": self.eval_rows[0].prompt[-1].get("content", ""),
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
                processes=self.processes,
            )

    def _write(self, result: TrainingResult, adapter: bool) -> None:
        tensors = trained_tensors(self.model) if adapter else None
        self.processes.from_main(lambda: self._write_files(result, tensors))

    def _write_files(self, result: TrainingResult, tensors: dict[str, torch.Tensor] | None) -> None:
        metrics = {
            **{name: value for name, value in asdict(result).items() if name not in _APART},
            "finished": not result.interrupted,
            "exact_match_before": result.before,
            "exact_match_after": result.after,
            "options": self.state.options,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("gralora", "torch", "transformers", "peft", "trl")},
            "losses": result.losses,
            "eval_losses": result.eval_losses,
        }
        with replacing_files(self.folder.path) as partial:
            if tensors is not None:
                self._save_adapter(partial, tensors)
            write_json(partial / "metrics.json", metrics)
            if result.losses:
                write_loss_curve(partial / "loss.png", result.losses, result.eval_losses)
            card = model_card.render(self.options, self.model.peft_config["default"], self.global_batch, result)
            (partial / "README.md").write_text(card)

    def _save_adapter(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        config = self.model.peft_config["default"]
        loaded_from = config.base_model_name_or_path
        config.base_model_name_or_path = pretrained.stored_name(self.options.model)
        try:
            save_checked(self.model, path, tensors)
        finally:
            config.base_model_name_or_path = loaded_from


def _packaged_rows(split: str) -> Rows:
    return parse_rows(((f"row {i}", row) for i, row in enumerate(support_rows(split))), PACKAGED_TASK)


def _base_dtype(model: Any, options: TrainingOptions) -> str:
    dtype = dtype_name(model.get_base_model().dtype)
    return f"{options.load_in}, {dtype}" if options.load_in else dtype


def _target_name(name: str, layer: GraloraLayer) -> str:
    """Return the last part of the name of an adapted weight; of a stack, with the module and the number of experts.

    Example: "experts.down_proj (8 experts each)".
    """
    parts = layer.weight_name(name).split(".")
    return f"{'.'.join(parts[-2:])} ({layer.experts[0]} experts each)" if layer.experts else parts[-1]
