"""The processes of a training run: which of them this one is, and how they agree.

torchrun and accelerate's launcher start the same command several times. accelerate's `PartialState` finds out
about the others and connects them; the Trainer shares it. A single process never touches torch.distributed.
"""

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# Names by which torchrun, accelerate and the MPI libraries say how many processes there are.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
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
        kind: How the processes train: "one process", "DDP", "FSDP2" or "DeepSpeed".
        restarted: Whether torchrun has restarted the processes after a failure.
        launch: Name of the launch, the same before and after a restart; None without torchrun.

    Raises:
        ValueError: accelerate is configured for the first version of FSDP.
        ImportError: accelerate is configured for DeepSpeed, which is not installed.
    """

    def __init__(self) -> None:
        self._state = _connected() if _launched() > 1 else None
        self.count: int = self._state.num_processes if self._state else 1
        self.rank: int = self._state.process_index if self._state else 0
        self.is_main = self.rank == 0
        self.kind = _kind() if self._state else "one process"
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
        run = os.environ.get("TORCHELASTIC_RUN_ID")
        # Every launch by hand has the same id; the launcher itself outlives a restart.
        self.launch = f"{run} of process {os.getppid()} on {socket.gethostname()}" if run else None

    @property
    def share_model(self) -> bool:
        """Whether a process may hold only a part of the model, so that all must run it in step."""
        return self.kind in ("FSDP2", "DeepSpeed")

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

    def stop(self, message: str) -> NoReturn:
        """End the run in every process; all must call this with the same message.

        Raises:
            RuntimeError: In the main process.
            StoppedTogetherError: In the others.
        """
        raise (RuntimeError if self.is_main else StoppedTogetherError)(message)

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


def is_main_process() -> bool:
    """Return whether this process is the main one, before the processes are connected too."""
    return all(int(os.environ.get(name) or 0) == 0 for name in _RANKS)


def speaks() -> bool:
    """Return whether this process reports an error of its own.

    Before the processes are connected, all fail alike, but for what differs between machines: one speaks on each.
    """
    if is_main_process() or os.environ.get("LOCAL_RANK") == "0":
        return True
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def give_way() -> None:
    """Let the main process report first: the launcher ends all others as soon as one process has ended."""
    if not is_main_process():
        time.sleep(1)


def disconnect() -> None:
    """Disconnect the processes, at the end of a program that succeeded."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _launched() -> int:
    """Return the number of processes that a launcher started."""
    return max(int(os.environ.get(name) or 1) for name in _COUNTS)


def _kind() -> str:
    """Return how accelerate is configured to train with several processes."""
    if _wanted("DEEPSPEED"):
        return "DeepSpeed"
    return "FSDP2" if _wanted("FSDP") else "DDP"


def _wanted(what: str) -> bool:
    """Return whether accelerate's launcher was told to use it."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _connected() -> Any:
    """Return accelerate's state of this process, connected with the others."""
    if _wanted("FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"`fsdp_version` must be 2 in the configuration of accelerate; got "
            f"fsdp_version={os.environ.get('FSDP_VERSION', '1')}. Write `fsdp_version: 2` under `fsdp_config`."
        )
    if _wanted("DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError("deepspeed must be installed for this. Run: pip install deepspeed")
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    _meet_anew()
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run, as the Trainer does by itself
    state = PartialState(cpu=_wanted("CPU"), timeout=_TIMEOUT)
    if state.num_processes > 1:
        return state
    # Without an accelerator, accelerate lets every process train by itself, unless it is told to use the CPU. Told
    # so, it ignores FSDP and DeepSpeed; they get gloo by name, and FSDP the type that accelerate looks for.
    PartialState._reset_state()
    if _kind() == "DDP":
        return PartialState(cpu=True, timeout=_TIMEOUT)
    state = PartialState(backend="gloo", timeout=_TIMEOUT)
    if _kind() == "FSDP2":
        state.distributed_type = DistributedType.MULTI_GPU
    return state


def _meet_anew() -> None:
    """Let restarted processes meet at a port of their own.

    They would find where those before them listened, since torchrun keeps its store: pytorch/pytorch#135712.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"gralora/port/{restarts}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = store.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__
