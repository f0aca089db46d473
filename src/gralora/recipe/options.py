"""The options of a training run: the one list that the command line, YAML files and `TrainingOptions` share."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gralora.checks import full_dtype_name, is_number, require_integer, require_positive, require_text
from gralora.optional import DEFAULT_MODEL

PACKAGED_TASK = "the packaged task"
PACKAGED_TASK_STEPS = 40
DEFAULT_EPOCHS = 3.0
ALL_LINEAR = "all-linear"
TRAIN_ON = ("all-answers", "last-answer", "everything")
TRACKERS = ("tensorboard", "wandb", "mlflow")
# Shape of a new adapter. An adapter to start from brings its own.
_SHAPE = {"r": 32, "hybrid_r": 0, "k": 2, "dropout": 0.0, "target_modules": ALL_LINEAR, "bias": "none"}
_SHAPE_ONLY = (
    "alpha",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "k_pattern",
    "use_rslora",
    "adapter",
)


def _option(group: str, help: str, default: Any = None, *, shown: Any = None, flags: Sequence[str] = ()) -> Any:
    """Return a field with what the command line needs: group, help text, default as shown, and other spellings."""
    shown = default if shown is None else shown
    return field(default=default, metadata={"group": group, "help": help, "shown": shown, "flags": tuple(flags)})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a training run; docs/training.md explains when to change which.

    Options of the adapter that are None take their defaults when the object is made, and those of the adapter in
    `start_from` where there is one; so does `model`. `data`, `eval` and `eval_data` also take a single text.

    Raises:
        ValueError: A value breaks its rule; the message names both.
    """

    model: str = _option(
        "Model",
        "Base model: folder, hub name or GGUF file; with --start-from, the one that the adapter names unless given.",
        shown=DEFAULT_MODEL,
    )
    dtype: str = _option("Model", "Dtype of the base model: auto, float32, bfloat16 or float16.", "auto")
    load_in: str | None = _option("Model", "Quantise the base model: 4bit or 8bit (bitsandbytes).")
    attention: str | None = _option(
        "Model", "Attention implementation of transformers: sdpa, eager, flash_attention_2, ..."
    )
    allow_missing: bool = _option("Model", "Train even where the base model's files lack weights.", False)
    start_from: str | None = _option("Model", "Folder of a GraLoRA adapter to train further, as a new run.")

    data: tuple[str, ...] = _option(
        "Data",
        "Training rows: a JSONL, JSON, CSV or Parquet file (also .gz), a dataset as `name:split`, or - for standard "
        "input; repeatable.",
        (),
        shown=PACKAGED_TASK,
    )
    eval: tuple[str, ...] = _option("Data", "Held-out rows, scored by exact match before and after training.", ())
    eval_data: tuple[str, ...] = _option("Data", "Held-out rows whose loss is measured during training.", ())
    validation_share: float | None = _option(
        "Data", "Share of the training rows to hold out for the evaluation loss, such as 0.05."
    )
    train_on: str = _option("Data", "What the loss covers: all-answers, last-answer or everything.", "all-answers")
    max_length: int = _option("Data", "Maximum tokens per row; longer rows are truncated.", 1024)
    packing: bool = _option("Data", "Put several short rows into one sequence.", False)

    r: int | None = _option("Adapter", "Rank.", shown=_SHAPE["r"], flags=("--rank",))
    hybrid_r: int | None = _option("Adapter", "Rank of the plain LoRA beside the blocks.", shown=_SHAPE["hybrid_r"])
    alpha: float | None = _option("Adapter", "The update's scale is alpha / (r + hybrid_r).", shown="2 (r + hybrid_r)")
    k: int | None = _option("Adapter", "Blocks per side of each weight; divides r.", shown=_SHAPE["k"])
    dropout: float | None = _option("Adapter", "Dropout probability of the adapter's input.", shown=_SHAPE["dropout"])
    target_modules: str | None = _option(
        "Adapter", "Module names separated by commas, or a regular expression.", shown=ALL_LINEAR
    )
    exclude_modules: str | None = _option(
        "Adapter", "Modules to leave out: names separated by commas, or a regular expression."
    )
    target_parameters: str | None = _option(
        "Adapter", "Parameters to adapt, such as experts.down_proj, separated by commas."
    )
    modules_to_save: str | None = _option("Adapter", "Modules to train in full, separated by commas.")
    layers_to_transform: str | None = _option("Adapter", "Numbers of the layers to adapt: 0,1,2 or 0-7.")
    rank_pattern: tuple[str, ...] = _option("Adapter", "Another rank for modules: NAME=RANK; repeatable.", ())
    alpha_pattern: tuple[str, ...] = _option("Adapter", "Another alpha for modules: NAME=ALPHA; repeatable.", ())
    k_pattern: tuple[str, ...] = _option("Adapter", "Another k for modules: NAME=K; repeatable.", ())
    use_rslora: bool = _option("Adapter", "Scale by alpha / sqrt(r + hybrid_r).", False)
    bias: str | None = _option("Adapter", "Biases to train: none, all or gralora_only.", shown=_SHAPE["bias"])

    lr: float = _option("Optimisation", "Peak learning rate.", 1e-3)
    steps: int | None = _option(
        "Optimisation",
        "Number of steps, instead of --epochs.",
        shown=f"{PACKAGED_TASK_STEPS} for {PACKAGED_TASK}",
    )
    epochs: float | None = _option(
        "Optimisation", "Number of passes over the rows, instead of --steps.", shown=f"{DEFAULT_EPOCHS:g}"
    )
    batch_size: int = _option("Optimisation", "Rows that one process handles at once.", 8)
    grad_accumulation: int = _option(
        "Optimisation", "Number of such batches whose gradients are added up for one step.", 1
    )
    scheduler: str = _option("Optimisation", "Learning-rate schedule of transformers.", "cosine")
    warmup: float = _option(
        "Optimisation", "Length of the warm-up: a share of the steps below 1, or a number of steps.", 0.1
    )
    weight_decay: float = _option("Optimisation", "Weight decay of the adapter.", 0.0)
    optimizer: str = _option("Optimisation", "Optimizer of transformers.", "adamw_torch")
    mixed_precision: str | None = _option(
        "Optimisation", "Autocast: no, bf16 or fp16.", shown="no, or as accelerate's configuration says"
    )
    gradient_checkpointing: bool = _option("Optimisation", "Use less memory, about a fifth slower.", False)
    seed: int = _option("Optimisation", "Random seed for starting values, order of rows and dropout.", 0)
    threads: int | None = _option("Optimisation", "Number of CPU threads.", shown="torch's own")

    eval_steps: int | None = _option("Evaluation", "Steps between two evaluation losses.", shown="a tenth of the run")
    keep_best: bool = _option("Evaluation", "Keep the adapter with the lowest evaluation loss.", False)
    patience: int | None = _option(
        "Evaluation", "Stop after this many evaluations without a lower loss, and keep the best."
    )
    sample_every: int | None = _option("Evaluation", "Steps between two printed answers to a held-out row.")

    output: str = _option("Run", "Folder to write, new or empty.", "gralora-adapter")
    save_steps: int | None = _option("Run", "Steps between two checkpoints.", shown="a quarter of the run, 200 at most")
    log_to: tuple[str, ...] = _option("Run", "Log to tensorboard, wandb or mlflow; repeatable.", ())
    push_to_hub: str | None = _option("Run", "Name of a repository on the hub to which the adapter is uploaded.")

    # In YAML files only: other fields of GraloraConfig, and of TRL's SFTConfig.
    adapter: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is None and self.start_from is None:
            self._set("model", DEFAULT_MODEL)
        for name in ("data", "eval", "eval_data", "rank_pattern", "alpha_pattern", "k_pattern", "log_to"):
            value = getattr(self, name)
            self._set(name, (value,) if isinstance(value, str) else tuple(value or ()))
            for text in getattr(self, name):
                require_text(name, text)
        require_text("output", self.output)
        for name in _TEXTS:
            if getattr(self, name) is not None:
                require_text(name, getattr(self, name))
        for name in ("batch_size", "grad_accumulation", "max_length"):
            require_integer(name, getattr(self, name))
        for name in ("steps", "threads", "eval_steps", "save_steps", "patience", "sample_every"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name))
        require_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        require_positive("lr", self.lr)
        if self.epochs is not None:
            require_positive("epochs", self.epochs)
        self._set("dtype", full_dtype_name(self.dtype, allow_auto=True))
        _require_choice("load_in", self.load_in, ("4bit", "8bit"))
        _require_choice("train_on", self.train_on, TRAIN_ON)
        _require_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for tracker in self.log_to:
            _require_choice("log_to", tracker, TRACKERS)
        if not is_number(self.weight_decay) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"`weight_decay` must be zero or a finite positive number; got weight_decay={self.weight_decay!r}."
            )
        if not is_number(self.warmup) or self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ValueError(
                f"`warmup` must be a share from 0 to 1 or a whole number of steps; got warmup={self.warmup!r}."
            )
        if self.validation_share is not None and not (
            is_number(self.validation_share) and 0 < self.validation_share < 1
        ):
            raise ValueError(
                f"`validation_share` must be between 0 and 1; got validation_share={self.validation_share!r}."
            )
        if reason := self._combination_refusal():
            raise ValueError(reason)
        self._shape()
        if self.start_from is None:
            self.adapter_config()
        elif self.model is None:
            self._set("model", self._base_of_start())

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter with the lowest evaluation loss is kept."""
        return self.keep_best or self.patience is not None

    def _base_of_start(self) -> str:
        from gralora.pretrained import base_of_adapter
        from gralora.recipe.start import read_start

        named = read_start(str(self.start_from)).get("base_model_name_or_path")
        if not named:
            raise ValueError(f"`model` must be given: the adapter in {self.start_from!r} names no base model.")
        return base_of_adapter(str(self.start_from), named)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _combination_refusal(self) -> str | None:
        """Return which options contradict each other, or None."""
        if self.steps is not None and self.epochs is not None:
            return f"`steps` or `epochs` must be given, not both; got steps={self.steps}, epochs={self.epochs}."
        for name in ("eval", "eval_data"):
            if getattr(self, name) and not self.data:
                return f"`{name}` must come with `data`; without `data`, {PACKAGED_TASK} would be trained on."
        if self.eval_data and self.validation_share is not None:
            return "`eval_data` or `validation_share` must be given, not both."
        has_validation = self.eval_data or self.validation_share is not None
        for name in ("keep_best", "patience"):
            if getattr(self, name) and not has_validation:
                return f"`{name}` must come with `eval_data` or `validation_share`, whose loss decides."
        if self.keeps_best and self.save_steps is not None:
            return "`save_steps` must be left out with `keep_best` and `patience`: each evaluation writes a checkpoint."
        if self.eval_steps is not None and self.data and not has_validation:
            return "`eval_steps` must come with `eval_data` or `validation_share`, whose loss is measured."
        return None

    def _shape(self) -> None:
        """Fill in the defaults of a new adapter, or check that none is given for an adapter to start from."""
        if self.start_from is None:
            for name, default in _SHAPE.items():
                if getattr(self, name) is None:
                    self._set(name, default)
            if self.alpha is None and is_number(self.r) and is_number(self.hybrid_r):
                self._set("alpha", 2 * (self.r + self.hybrid_r))  # pyright: ignore[reportOptionalOperand]
            return
        for name in (*_SHAPE, *_SHAPE_ONLY):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be left out with `start_from`, whose adapter brings its own; got "
                    f"{name}={getattr(self, name)!r}."
                )

    def adapter_config(self) -> Any:
        """Return the configuration of the adapter: a `GraloraConfig`."""
        from gralora.tuner.config import GraloraConfig

        if self.start_from is not None:
            from gralora.recipe.start import read_start

            read_start(self.start_from)
            config = GraloraConfig.from_pretrained(self.start_from)
            config.inference_mode = False
            return config
        settings: dict[str, Any] = {
            "r": self.r,
            "hybrid_r": self.hybrid_r,
            "alpha": self.alpha,
            "gralora_k": self.k,
            "gralora_dropout": self.dropout,
            "target_modules": parse_modules(self.target_modules or ALL_LINEAR, "target_modules"),
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "task_type": "CAUSAL_LM",
        }
        if self.exclude_modules:
            settings["exclude_modules"] = parse_modules(self.exclude_modules, "exclude_modules")
        for name in ("target_parameters", "modules_to_save"):
            if text := getattr(self, name):
                settings[name] = [part.strip() for part in text.split(",") if part.strip()]
        if self.layers_to_transform:
            settings["layers_to_transform"] = parse_layers(self.layers_to_transform)
        for name, kind in (("rank_pattern", int), ("alpha_pattern", float), ("k_pattern", int)):
            if pairs := getattr(self, name):
                settings[name] = dict(_pattern(name, pair, kind) for pair in pairs)
        known = {field.name for field in fields(GraloraConfig)}
        for name, value in self.adapter.items():
            if name in settings or name not in known - _NOT_TO_BE_SET:
                raise ValueError(
                    f"`adapter` must hold fields of GraloraConfig that have no option; got {name!r}."
                    f"{_adapter_hint(name, known - _NOT_TO_BE_SET)}"
                )
            settings[name] = value
        return GraloraConfig(**settings)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of a run with `steps_per_epoch` steps for one pass over the rows."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None and not self.data:
            return PACKAGED_TASK_STEPS
        return max(1, math.ceil(steps_per_epoch * (self.epochs or DEFAULT_EPOCHS)))

    def warmup_steps(self, total: int) -> int:
        """Return the number of steps over which the learning rate rises, in a run of `total` steps."""
        return math.ceil(total * self.warmup) if self.warmup < 1 else int(self.warmup)


_TEXTS = (
    "model",
    "load_in",
    "attention",
    "start_from",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "layers_to_transform",
    "bias",
    "scheduler",
    "optimizer",
    "push_to_hub",
)
# Fields of GraloraConfig that PEFT or the tuner set.
_NOT_TO_BE_SET = {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "layer_kinds"}
_NOT_TO_BE_SET |= {"base_model_name_or_path", "revision"}


def _adapter_hint(name: str, known: set[str]) -> str:
    """Return the option for a field of GraloraConfig, or the field whose name is nearest."""
    owned = name.removeprefix("gralora_")
    if name in known and owned in {field.name for field in fields(TrainingOptions)}:
        return f" Use `{owned}`."
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Nearest: {near[0]!r}." if near and name not in known else ""


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ValueError(f"`{name}` must be {listed}; got {name}={value!r}.")


def parse_modules(text: str, name: str) -> str | list[str]:
    """Return `text` in PEFT's form: names as a list, "all-linear" and regular expressions unchanged.

    Raises:
        ValueError: A name is missing, or the text is no regular expression.

    Example:
        >>> parse_modules("q_proj, v_proj", "target_modules")
        ['q_proj', 'v_proj']
    """
    names = [part.strip() for part in text.split(",")]
    if text == ALL_LINEAR:
        return text
    if all(part and part.replace(".", "_").isidentifier() for part in names):
        return names
    reason = "a name is missing" if not names[0] or not names[-1] else None
    if not reason:
        try:
            re.compile(text)
        except re.error as error:
            reason = str(error)
    if reason:
        raise ValueError(f"`{name}` must be names or a regular expression; got {name}={text!r}: {reason}.")
    return text


def parse_layers(text: str) -> list[int]:
    """Return the layer numbers in `text`.

    Raises:
        ValueError: It is not a list of numbers and ranges.

    Example:
        >>> parse_layers("0, 4-6")
        [0, 4, 5, 6]
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(
                f"`layers_to_transform` must be numbers and ranges such as 0,1,4-6; got layers_to_transform={text!r}."
            )
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def _pattern(name: str, pair: str, kind: type) -> tuple[str, Any]:
    modules, _, value = pair.rpartition("=")
    try:
        if not modules:
            raise ValueError
        return modules, kind(value)
    except ValueError:
        raise ValueError(f"`{name}` must be NAME=NUMBER; got {name}={pair!r}.") from None
