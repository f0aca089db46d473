"""Writing a folder or a file so that it appears whole under its name, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A folder is replaced only if it holds one of these: `--overwrite` with a mistyped path must not cost a home folder.
_MARKS = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def check_output(
    output: str | Path, overwrite: bool, inputs: tuple[Path, ...] = (), marks: tuple[str, ...] = _MARKS
) -> Path:
    """Return `output` as a path that may be written; called before any work is done.

    Args:
        output: Folder or file to write.
        overwrite: Replace what is there.
        inputs: What is read, and must survive.
        marks: A folder is replaced only if it holds one of these files.

    Raises:
        ValueError: It exists, or is no export that could be replaced, or is one of the inputs.
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
        raise ValueError(f"`output` must not exist; got {str(path)!r}. Name another one, or add --overwrite.")
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
    """Give a hidden path beside `output` to write a folder or a file to, and move it into place at the end.

    An error removes what was written and leaves what was there before. The old one is moved away first
    and back if the move fails; nobody ever sees half of either.
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
            with suppress(OSError):  # somebody else put something there
                for parent in new_parents:
                    parent.rmdir()


def mend(output: Path) -> None:
    """Clear up after runs that were killed: put an old one back that was moved away, and remove what was unfinished."""
    for workshop in output.parent.glob(f".{output.name}.*.partial"):
        owner = workshop.name.removeprefix(f".{output.name}.").split(".")[0]
        if not owner.isdigit() or _is_running(int(owner)):
            continue
        old = workshop / f"{output.name}.old"
        if old.exists() and not output.exists():
            old.rename(output)
        _discard(workshop)


def _discard(workshop: Path) -> None:
    """Remove a workshop, the configs first: what a kill leaves of it is then no model and no adapter to anybody."""
    with suppress(OSError):
        for config in workshop.glob("*/*config.json"):
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
