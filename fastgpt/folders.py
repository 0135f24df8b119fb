"""Folders of checkpoints and runs: safe access to files of a checkpoint, atomic replacement of files, creation of folders."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHIPPED_MODEL = Path(__file__).parent / "assets" / "shakespeare-char"  # the checkpoint that comes with the package


def find(folder: Path, name: str | Path, argument: str = "model") -> Path | None:
    """The path of a file in a checkpoint, or None. All files of a checkpoint are opened through this function.

    Symbolic links must not lead out of the folder, except into the Hub's cache: there a checkpoint is a folder
    CACHE/models--ID/snapshots/COMMIT of links to CACHE/models--ID/blobs, some of which link to CACHE/blobs.

    Args:
        folder: of the checkpoint.
        name: of the file, relative to the folder.
        argument: the name that errors begin with.

    Raises: ValueError for a link that leads elsewhere.
    """
    path = folder / name
    if not os.path.isfile(path):  # Path.is_file() raises for a name that is too long
        return None
    root, target = folder.resolve(), path.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{argument}: {path}: expected a file in this folder, got a link to {target}")
    return path


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A context manager that creates a folder and its parents. On exit it removes those that it created and that are still
    empty, so that a failure leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`with new_folder(path) as temporary`: what is written into the folder `temporary` appears at `path`, where nothing may be,
    whole or not at all. Its parents are created."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    with made(path.parent):
        temporary.mkdir()
        try:
            yield temporary
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class replacing:
    """`with replacing(path) as temporary`: what is written to `temporary` appears at `path` whole, or not at all.

    A file that is replaced keeps its mode; a new one has what the umask leaves, whoever writes it: safetensors makes files that
    nobody else can read. A link is replaced itself, not what it leads to.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(path.name + ".writing")

    def __enter__(self) -> Path:
        self.temporary.unlink(missing_ok=True)  # of a process that was killed
        kept = None
        with suppress(FileNotFoundError):
            if stat.S_ISREG((present := os.lstat(self.path)).st_mode):
                kept = stat.S_IMODE(present.st_mode)
        mode = 0o666 if kept is None else kept | stat.S_IWUSR
        with open(os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            self.mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) if kept is None else kept
        return self.temporary

    def __exit__(self, exception: type[BaseException] | None, *_) -> None:
        try:
            if exception is None:
                with suppress(OSError):  # some file systems have no modes
                    self.temporary.chmod(self.mode)
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)
