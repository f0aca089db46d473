"""Writing folders and files so that they appear complete under their name, or not at all.

`appearing` serves an output that the user names, `appearing_once` an entry of a cache that several processes
may write at the same time, and `replacing_files` an existing folder whose files are replaced one by one.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gralora.files.disk import explaining_full_disk
from gralora.files.names import CONFIG_FILE, DIFFUSERS_FILE, TENSOR_FILE

# Overwriting a mistyped path must not delete a home folder: only a folder with one of these files is replaced.
_MARKS = ((CONFIG_FILE,), (TENSOR_FILE,), (DIFFUSERS_FILE,))
_PARTIAL = ".partial-"


def check_output(
    output: str | Path,
    overwrite: bool,
    inputs: tuple[Path, ...] = (),
    marks: tuple[tuple[str, ...], ...] = _MARKS,
    kind: Literal["folder", "file"] = "folder",
) -> Path:
    """Return `output` as a path that may be written. Call this before any expensive work.

    Args:
        output: Folder or file to write.
        overwrite: Allow replacing a file by a file, and an empty or marked folder by a folder.
        inputs: Folders and files that are read, which `output` must not replace.
        marks: Alternatives, each a tuple of file patterns. A folder to be replaced must have a file for every
            pattern of one of them.
        kind: What will be written.

    Raises:
        ValueError: `output` exists and may not be replaced, holds an input, or is not in a writable folder.
    """
    path = Path(output)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"`output` must be in a writable folder; got {str(path)!r}, and {str(parent)!r} is not one.")
    clean_up_killed_runs(path)
    target = path.resolve()
    for source in (source.resolve() for source in inputs):
        if target == source or target in source.parents:
            raise ValueError(f"`output` must not hold what is read; got {str(path)!r} with {str(source)!r}.")
    if not (path.exists() or path.is_symlink()):
        return path
    if not overwrite:
        raise ValueError(f"`output` must not exist; got {str(path)!r}. Name another one, or pass `overwrite=True`.")
    if path.is_symlink() or not (path.is_dir() if kind == "folder" else path.is_file()):
        raise ValueError(f"`output` must be a {kind} to be overwritten; {str(path)!r} is not. Name another one.")
    if kind == "folder" and not (_is_empty(path) or any(_has_all(path, mark) for mark in marks)):
        wanted = " or ".join(" and ".join(mark) for mark in marks)
        raise ValueError(f"`output` must hold {wanted} to be overwritten; {str(path)!r} does not. Name another one.")
    return path


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """Yield a hidden path beside `output` for a new folder or file, and move it to `output` at the end.

    An error removes what was written and keeps what was at `output` before. An old output is moved away
    first, and moved back if the second move fails, so that no reader sees a half-written output.
    """
    new_parents = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(".partial", f".{output.name}.{os.getpid()}.", output.parent))
    new, old = hidden / output.name, hidden / f"{output.name}.old"
    try:
        with explaining_full_disk(output):
            yield new
            _apply_umask(new)
        try:
            if output.exists():
                output.rename(old)
            os.replace(new, output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    finally:
        _discard(hidden)
        if not output.exists():
            with suppress(OSError):  # another process wrote into it
                for parent in new_parents:
                    parent.rmdir()


@contextmanager
def appearing_once(folder: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `folder`, and move it there at the end.

    If another process has written `folder` by then, its folder stays and this one is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Never cleaned up: the processes that share a cache may run on other machines, where their ids mean nothing here.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with explaining_full_disk(folder):
            yield partial
            _apply_umask(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        _discard(partial)


@contextmanager
def replacing_files(folder: Path, last: str = CONFIG_FILE) -> Iterator[Path]:
    """Yield a hidden folder inside the existing `folder`, and move its files into `folder` one by one at the end.

    An error before the first move removes them and changes nothing. The hidden folder is inside, because the
    parent of `folder` may be on another file system.

    Args:
        folder: Existing folder.
        last: Name of the file that is moved last, the one without which readers ignore the others.
    """
    with explaining_full_disk(folder):
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        with explaining_full_disk(folder):
            yield partial
            _apply_umask(partial)
            for file in sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name)):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard_unfinished(folder: Path) -> None:
    """Remove what interrupted runs of `replacing_files` left in `folder`. No other process may be writing there."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def clean_up_killed_runs(output: Path) -> None:
    """Restore an old output that a killed run of `appearing` moved away, and remove what such runs left."""
    for hidden in output.parent.glob(".*.partial"):
        match = re.fullmatch(rf"\.{re.escape(output.name)}\.(\d+)\.[^.]+\.partial", hidden.name)
        if match is None or _is_running(int(match[1])):
            continue
        old = hidden / f"{output.name}.old"
        if old.exists() and not output.exists():
            old.rename(output)
        _discard(hidden)


def _apply_umask(written: Path) -> None:
    """Give `written` and all in it the permissions of the user's umask: temporary files are private at first."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (written, *written.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _discard(hidden: Path) -> None:
    """Delete config files first, so that an interrupted delete leaves nothing loadable."""
    with suppress(OSError):
        for config in (*hidden.glob("*config.json"), *hidden.glob("*/*config.json")):
            config.unlink(missing_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _has_all(folder: Path, patterns: tuple[str, ...]) -> bool:
    return all(any(file.is_file() for file in folder.glob(pattern)) for pattern in patterns)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())
