"""The result of a training run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingResult:
    """Losses, scores and speed of a training run.

    Attributes:
        output: Folder with the adapter.
        steps: Number of steps done, including those before a resume.
        total_steps: Number of steps of the whole run.
        stopped_early: Whether the run ended before `total_steps` because the evaluation loss fell no more.
        losses: Training loss of each step.
        eval_losses: Pairs of a step and the evaluation loss after it.
        best_step: Step whose adapter was kept for its evaluation loss; None where the last one was kept.
        before: Exact match of the base model on the held-out rows; None without held-out rows.
        after: Exact match of the trained model on the held-out rows; None without held-out rows or where the
            run was interrupted.
        example: The first held-out row: its prompt, its reference answer, and the answers before and after.
        tokens_per_second: Mean training speed of this call; None where it did no step.
        seconds: Duration of this call.
    """

    output: str
    steps: int
    total_steps: int
    stopped_early: bool
    losses: tuple[float, ...]
    eval_losses: tuple[tuple[int, float], ...]
    best_step: int | None
    before: float | None
    after: float | None
    example: dict[str, str | None] | None
    tokens_per_second: float | None
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether steps are left to do."""
        return self.steps < self.total_steps and not self.stopped_early
