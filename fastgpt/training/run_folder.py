"""The folder of a training run: checked to be new, and locked against other runs."""

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # stands for the module

from fastgpt import folders
from fastgpt.checkpoints.files import STATE
from fastgpt.checks import write_error
from fastgpt.training.processes import Processes

LOCK = "training.lock"  # exists while a run uses the folder


def require_new_run(folder: Path) -> None:
    """Raises ValueError if a folder holds a run or a model, which a new run would overwrite."""
    if os.path.lexists(folder / STATE):
        raise ValueError(f"out: expected a new folder, {folder} holds a run; continue it with --resume")
    if weights := sorted(
        path.name for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)
    ):
        raise ValueError(f"out: expected a new folder, {folder} holds the model {weights[0]}")


# Folders claimed in this context: claims may be nested.
_claimed: ContextVar[frozenset[Path]] = ContextVar("claimed", default=frozenset())


@contextmanager
def claimed(folder: Path, processes: Processes = Processes()) -> Iterator[None]:
    """A context manager that creates a folder if necessary, and reserves it: two runs would overwrite each other's checkpoints.

    The first process holds an exclusive lock on a file there, which the system releases when the process dies. The file is
    removed at the end, and so are folders that were created and are empty. Where the system or the file system has no such
    locks, the folder is only created. All processes enter and exit together.

    Raises: ValueError in all processes if another run uses the folder; OSError if it cannot be created or written to.
    """
    path = Path(folder).absolute()
    if path in _claimed.get():
        yield
        return
    lock, error = None, None  # type: IO[str] | None, Exception | None
    with ExitStack() as made:
        if processes.first:
            try:
                made.enter_context(folders.made(path))
                lock = _lock(path)
            except BlockingIOError as raised:
                error = ValueError(f"out: expected a folder that no other run uses, {folder} is in use by {raised.strerror}")
            except OSError as raised:  # also for names that are too long
                error = write_error("out", folder, f"expected a folder, got {str(folder)!r}", raised)
            except ValueError as raised:  # or hold a null character
                error = ValueError(f"out: expected a folder, got {str(folder)!r}: {raised}")
        before = _claimed.set(_claimed.get() | {path})
        try:
            if processes.any(error is not None):
                raise error or ValueError(f"out: expected a folder that the first process can use, got {str(folder)!r}")
            yield
        finally:
            _claimed.reset(before)
            if lock is not None:
                with suppress(OSError):
                    (path / LOCK).unlink()  # before it is unlocked, so that no other run's file is removed
                lock.close()


def _lock(folder: Path) -> IO[str]:
    """The folder's lock file, open and locked. Raises BlockingIOError whose strerror names the owner of the lock."""
    for _ in range(10):  # another run that ends may remove the file or folder in between
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a+", opener=_opened_here)
        except FileNotFoundError as error:
            missing = error
            continue
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise BlockingIOError(error.errno, file.read().strip() or "another process") from None
        except OSError:  # a file system without locks
            pass
        try:
            current = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
        except FileNotFoundError as error:
            current, missing = False, error
        if current:
            try:
                file.truncate(0)
                print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
                return file
            except OSError:
                (folder / LOCK).unlink()
                with suppress(OSError):  # closing flushes again what could not be written
                    file.close()
                raise
        file.close()
    raise missing


def _opened_here(path: str, flags: int) -> int:
    """Opens a file, but no symbolic link: that would lead outside of the folder."""
    if os.path.islink(path):
        raise OSError(f"{os.path.basename(path)} in it is a link")
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
