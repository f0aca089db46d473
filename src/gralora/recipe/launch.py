"""Starting a run as several processes, through accelerate's launcher."""

import logging
import os
import warnings
from typing import Any

from gralora.checks import require_integer
from gralora.optional import require

# A run that is interrupted saves a checkpoint first; torch's launcher would kill it after 30 seconds.
_SECONDS_TO_SAVE = "300"


def launch_refusal(processes: int) -> str | None:
    """Return why this process cannot start a run of that many processes, or None."""
    launched = int(os.environ.get("WORLD_SIZE") or 0)
    if launched not in (0, processes):
        return (
            f"`processes` must be left out where a launcher has started the processes; got processes={processes}, and "
            f"there are {launched}."
        )
    import torch

    devices = torch.cuda.device_count()
    if devices and processes > devices and not launched:
        return f"`processes` must be at most the number of GPUs, {devices}; got processes={processes}."
    return None


def is_to_launch(processes: int | None) -> bool:
    """Return whether this process must start others, and is not one of those that it started.

    Raises:
        ValueError: `processes` is no positive integer, or cannot be started.
    """
    if processes is None:
        return False
    require_integer("processes", processes)
    if reason := launch_refusal(processes):
        raise ValueError(reason)
    return processes > 1 and not os.environ.get("WORLD_SIZE")


def launch(arguments: list[str], processes: int) -> int:
    """Run `gralora` with `arguments` as several processes on this machine, and wait for them.

    The user's configuration of accelerate decides how they train: with DDP, FSDP or DeepSpeed. SIGINT, SIGTERM and
    SIGHUP are passed on, so that the run saves its state; a second one ends it at once.

    Args:
        arguments: Command line after `gralora`. Every process gets all of it.
        processes: Number of processes, at least two.

    Returns:
        The exit status of the run.
    """
    require("accelerate", "psutil", extra="train")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    logging.disable()  # the processes report what happens to them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            launch_command(launch_command_parser().parse_args(_accelerate_arguments(arguments, processes)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _status(failure.exitcode)
    except SignalException as error:
        return _status(-error.sigval)
    except KeyboardInterrupt:  # before the processes were started
        return 130
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _accelerate_arguments(arguments: list[str], processes: int) -> list[str]:
    flags = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    if "OMP_NUM_THREADS" not in os.environ:
        flags += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) // processes))]
    configured = _configured_type()
    if configured in (None, "NO", "MULTI_CPU"):
        # Without a GPU too: accelerate's way for CPUs needs MPI, and this one starts the processes by torchrun.
        flags.append("--multi_gpu")
    if configured is None:
        flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*flags, "-m", "gralora", *arguments]


def _configured_type() -> str | None:
    """Return the kind of distributed training in the user's configuration of accelerate, or None without one."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return None
    config: Any = load_config_from_file(None)
    return str(config.distributed_type.value)


def _status(exitcode: int) -> int:
    """Return an exit status as a shell has it, where -n stands for signal n."""
    return exitcode if exitcode >= 0 else 128 - exitcode
