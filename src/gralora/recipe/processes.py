"""The processes of a training run: which of them this one is, and how they agree.

torchrun and accelerate's launcher start the same command several times. accelerate's `PartialState` finds out
about the others and connects them; the Trainer shares it. A single process never touches torch.distributed.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

# Names by which torchrun, accelerate and the MPI libraries say how many processes there are.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Long, since others wait while the main process reads rows or downloads a model; the launcher notices a death at once.
_TIMEOUT = timedelta(hours=2)


class StoppedTogetherError(RuntimeError):
    """An error of another process, or one that all share; the main process raises it too, and reports it."""


class Processes:
    """The processes of this run.

    Every process must call the same methods in the same order, except for the attributes.

    Attributes:
        count: Number of processes.
        rank: Number of this process, from 0.
        is_main: Whether this process writes and prints.
        restarted: Whether torchrun has restarted the processes after a failure.
    """

    def __init__(self) -> None:
        self._state = _connected() if _launched() > 1 else None
        self.count: int = self._state.num_processes if self._state else 1
        self.rank: int = self._state.process_index if self._state else 0
        self.is_main = self.rank == 0
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self._state:
            self._state.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        if not self._state:
            return flag
        import torch
        from torch import distributed

        # A tensor, since this is called at every step and pickled objects are slow.
        value = torch.tensor([int(flag)], device=self._state.device)
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value.item())

    def from_main(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns in the main one, which alone calls it.

        Raises:
            Exception: In the main process, what `make` raises.
            StoppedTogetherError: In the others, its message.
        """
        if not self._state:
            return make()
        value, failure = None, None
        if self.is_main:
            try:
                value = make()
            except Exception as error:
                failure = error
        value, message = self._broadcast((value, None if failure is None else _message(failure)))
        if failure is not None:
            raise failure
        if message is not None:
            raise StoppedTogetherError(message)
        return value

    def together(self, action: Callable[[], T]) -> T:
        """Return what `action` returns here, once it has succeeded in every process.

        Raises:
            Exception: In the main process, what `action` raises there or, as a `RuntimeError`, elsewhere.
            StoppedTogetherError: In the others, the message of the first process in which it failed.
        """
        if not self._state:
            return action()
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        messages = self._gather(None if failure is None else _message(failure))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return value  # pyright: ignore[reportReturnType]
        if self.is_main and failure is not None:
            raise failure
        message = messages[failed[0]]
        if failed[0] > 0:
            message = f"{message} This happened in process {failed[0]} of 0 to {self.count - 1}."
        raise (RuntimeError if self.is_main else StoppedTogetherError)(message) from failure

    def one_per_node_first(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, called in one process of each node before the others.

        For what a first call leaves in a cache, such as a download.

        Raises:
            Exception: As `together` does.
        """
        first = self._state is None or self._state.is_local_main_process
        done = self.together(action) if first else self.together(lambda: None)
        if not self._state:
            return done  # pyright: ignore[reportReturnType]
        again = self.together(lambda: None) if first else self.together(action)
        return done if first else again  # pyright: ignore[reportReturnType]

    def gathered(self, items: Sequence[T]) -> list[T]:
        """Return the items of all processes, by rank."""
        if not self._state:
            return list(items)
        return [item for part in self._gather(list(items)) for item in part]

    def close(self) -> None:
        """Disconnect, at the end of a program that succeeded."""
        if self._state:
            self._state.destroy_process_group()

    def _gather(self, value: Any) -> list[Any]:
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def _broadcast(self, value: Any) -> Any:
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]


def _launched() -> int:
    """Return the number of processes that a launcher started."""
    return max(int(os.environ.get(name) or 1) for name in _COUNTS)


def _connected() -> Any:
    """Return accelerate's state of this process, connected with the others.

    Raises:
        ImportError: DeepSpeed is wanted and not installed.
    """
    from accelerate import DistributedType, PartialState

    def wanted(what: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"

    if wanted("DEEPSPEED"):
        from gralora.optional import require

        require("deepspeed", extra="train")
    state = PartialState(cpu=wanted("CPU"), timeout=_TIMEOUT)
    if state.num_processes > 1:
        return state
    # Without an accelerator, accelerate lets every process train by itself, unless it is told to use the CPU. Told
    # so, it ignores FSDP and DeepSpeed; they get gloo by name, and FSDP the type that accelerate looks for.
    PartialState._reset_state()
    if not (wanted("FSDP") or wanted("DEEPSPEED")):
        return PartialState(cpu=True, timeout=_TIMEOUT)
    state = PartialState(backend="gloo", timeout=_TIMEOUT)
    if wanted("FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU
    return state


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__
