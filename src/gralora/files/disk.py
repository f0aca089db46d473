"""A full disk, which every library reports in its own way."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Texts of Python, safetensors and torch. Torch only says that its file has another length than it wrote.
_TEXTS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "PytorchStreamWriter failed",
    "inline_container",
)
_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_SMALL = 64 * 1024  # free bytes, below which a write that failed did so for lack of space


class DiskFullError(RuntimeError):
    """The disk is full."""


@contextmanager
def explaining_full_disk(path: Path, way_out: str = "Free some space and try again.") -> Iterator[None]:
    """Turn the errors by which torch, safetensors, pyarrow and Python report a full disk into one.

    Args:
        path: Where is written, for the message.
        way_out: What to do then.

    Raises:
        DiskFullError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, path):
            raise
        raise DiskFullError(
            f"The disk is full: {str(path)!r} could not be written. The files that were complete are kept. {way_out}"
        ) from error


def _is_full(error: BaseException, path: Path) -> bool:
    if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _NUMBERS):
        return True
    if any(text in str(error) for text in _TEXTS):
        return True
    writes = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
    return writes and _free_bytes(path) < _SMALL


def _free_bytes(path: Path) -> float:
    try:
        return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free
    except OSError:
        return float("inf")
