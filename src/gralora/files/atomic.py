"""Writing folders and files so that they appear complete under their name, or not at all.

`appearing` serves an output that the user names, `appearing_once` an entry of a cache that several processes
may write at the same time, and `replacing_files` an existing folder whose files are replaced one by one.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gralora.files.names import CONFIG_FILE, DIFFUSERS_FILE, TENSOR_FILE

# Overwriting a mistyped path must not delete a home folder: only a folder with one of these files is replaced.
_MARKS = (CONFIG_FILE, TENSOR_FILE, DIFFUSERS_FILE)
_PARTIAL = ".partial-"


def check_output(
    output: str | Path, overwrite: bool, inputs: tuple[Path, ...] = (), marks: tuple[str, ...] = _MARKS
) -> Path:
    """Return `output` as a path that may be written. Call this before any expensive work.

    Args:
        output: Folder or file to write.
        overwrite: Allow replacing a file, an empty folder, or a folder with one of `marks`.
        inputs: Folders and files that are read, which `output` must not replace.
        marks: Files of which a folder to be replaced must have one.

    Raises:
        ValueError: `output` exists and may not be replaced, or holds an input.
    """
    path = Path(output)
    mend(path)
    target = path.resolve()
    for source in (source.resolve() for source in inputs):
        if target == source or target in source.parents:
            raise ValueError(f"`output` must not hold what is read; got {str(path)!r} with {str(source)!r}.")
    if not (path.exists() or path.is_symlink()):
        return path
    if not overwrite:
        raise ValueError(f"`output` must not exist; got {str(path)!r}. Name another one, or pass `overwrite=True`.")
    replaceable = path.is_file() or (
        path.is_dir() and (_is_empty(path) or any((path / mark).is_file() for mark in marks))
    )
    if path.is_symlink() or not replaceable:
        raise ValueError(
            f"`output` must hold {' or '.join(marks)} to be overwritten; {str(path)!r} does not. Name another one."
        )
    return path


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """Yield a hidden path beside `output` for a new folder or file, and move it to `output` at the end.

    An error removes what was written and keeps what was at `output` before. An old output is moved away
    first, and moved back if the second move fails, so that nobody ever sees half of either.
    """
    new_parents = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(".partial", f".{output.name}.{os.getpid()}.", output.parent))
    new, old = workshop / output.name, workshop / f"{output.name}.old"
    try:
        yield new
        for file in [new, *new.rglob("*")]:
            file.chmod(0o755 if file.is_dir() else 0o644)
        try:
            if output.exists():
                output.rename(old)
            os.replace(new, output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    finally:
        _discard(workshop)
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
    # Never mended: the processes that share a cache may run on other machines, where their ids mean nothing here.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
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
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        yield partial
        for file in sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard_unfinished(folder: Path) -> None:
    """Remove what interrupted runs of `replacing_files` left in `folder`. No other process may be writing there."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def mend(output: Path) -> None:
    """Clean up after killed runs of `appearing`: restore an old output that was moved away, remove unfinished ones."""
    for workshop in output.parent.glob(f".{output.name}.*.partial"):
        owner = workshop.name.removeprefix(f".{output.name}.").split(".")[0]
        if not owner.isdigit() or _is_running(int(owner)):
            continue
        old = workshop / f"{output.name}.old"
        if old.exists() and not output.exists():
            old.rename(output)
        _discard(workshop)


def _discard(workshop: Path) -> None:
    """Delete config files first, so that an interrupted delete leaves nothing loadable."""
    with suppress(OSError):
        for config in (*workshop.glob("*config.json"), *workshop.glob("*/*config.json")):
            config.unlink(missing_ok=True)
    shutil.rmtree(workshop, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())
