"""The claim of an output folder by one run, so that no two runs write into it.

The claim is a lock on a hidden file in the folder. The system frees the lock of a process that dies, so that a
killed run leaves a file that anyone may lock again.
"""

import errno
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

CLAIM_FILE = ".claim"
# What `flock` says where the file system has no locks.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class Claim:
    """The claim of a folder; one process of a run takes it before anything is read or written.

    Args:
        folder: Output folder of the run. It is made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None
        self._made: list[Path] = []

    def take(self) -> str | None:
        """Claim the folder.

        Returns:
            A note for the user where the file system cannot lock files, else None.

        Raises:
            ValueError: Another run has claimed the folder.
            RuntimeError: The folder cannot be written.
        """
        try:
            self._take()
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise ValueError(
                f"`output` must not be in use by another run; got output={str(self.folder)!r}, into which {holder} is "
                "training. Wait until it ends, or name another folder."
            ) from None
        except OSError as error:
            self.release()
            raise RuntimeError(
                f"`output` must be a folder that can be written; got output={str(self.folder)!r}: {error}"
            ) from None
        if self._file is not None:
            return None
        return (
            f"note: the file system of {str(self.folder)!r} cannot lock files, so nothing keeps a second run from "
            "writing there."
        )

    def release(self) -> None:
        """Give the folder back. A folder that was made for the claim and is still empty is removed."""
        if self._file is not None:
            with suppress(OSError):
                (self.folder / CLAIM_FILE).unlink()
            os.close(self._file)
            self._file = None
        with suppress(OSError):  # it holds a run by now, or another process is in it
            for folder in reversed(self._made):
                folder.rmdir()
        self._made = []

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            self._make_folder()
            return
        path = self.folder / CLAIM_FILE
        while self._file is None:
            self._make_folder()
            with suppress(FileNotFoundError):  # a run that has just ended removed the file or the folder
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(file), path.stat()):
                        self._file = file
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
                    path.unlink(missing_ok=True)
                    return
                finally:
                    if self._file is None:
                        os.close(file)
        self._sign(self._file)

    def _make_folder(self) -> None:
        new = [folder for folder in (*reversed(self.folder.parents), self.folder) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made += [folder for folder in new if folder not in self._made]

    def _sign(self, file: int) -> None:
        """Write who holds the claim, for the message to others; on a full disk it stays unwritten."""
        with suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())

    def _holder(self) -> str:
        try:
            stored = json.loads((self.folder / CLAIM_FILE).read_text())
            return f"process {stored['process']} on {stored['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
