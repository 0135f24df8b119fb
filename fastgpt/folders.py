"""Folders of checkpoints and runs: files in one that may come from anywhere, and folders that are made."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHIPPED_MODEL = Path(__file__).parent / "assets" / "shakespeare-char"  # a checkpoint that comes with the package


def find(folder: Path, name: str | Path, argument: str = "model") -> Path | None:
    """The file of that name in a checkpoint, or None. All that is read of a checkpoint is found here.

    Links do not lead out of the folder, except into the Hub's cache: there a checkpoint is a folder
    CACHE/models--ID/snapshots/COMMIT of links to CACHE/models--ID/blobs, some of them links to CACHE/blobs.

    Args:
        name: may have a folder in it.
        argument: whose the folder is, for errors.

    Raises: ValueError for another link.
    """
    path = folder / name
    if not os.path.isfile(path):  # nor of a name that is too long, of which Path.is_file() is an error
        return None
    own, target = folder.resolve(), path.resolve()
    roots = [own]
    if own.parent.name == "snapshots":
        roots += [own.parents[1] / "blobs", own.parents[2] / "blobs"]
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{argument}: {path}: expected a file in this folder, got a link to {target}")
    return path


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Within it there is a folder. At the end, of it and its parents those that were made for it are removed if they are empty:
    what fails leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
