"""Where a checkpoint is: a folder, or a model on the Hugging Face Hub, which is downloaded."""

import re
from pathlib import Path

from fastgpt.checks import require_path

DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def resolve(path: str | Path, revision: str | None = None, argument: str = "model") -> Path:
    """The folder of a checkpoint: `path` itself, or what the Hugging Face Hub has under that id, downloaded.

    Args:
        revision: of a model on the Hub, a branch, a tag or a commit; default its main branch.
        argument: whose the path is, for errors.

    Raises: FileNotFoundError where there is neither; ValueError for a revision of a local folder; TypeError for one that is not
        a str.
    """
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"revision: expected a string or None, got {revision!r}")
    folder = require_path(argument, path)
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise FileNotFoundError(f"{argument}: expected a checkpoint folder, got {folder}: {error.strerror}") from error
    if is_folder:
        require_no_revision(path, revision)
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{argument}: expected a checkpoint folder, {path} {what}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED, revision=revision))
    except Exception as error:  # of half a dozen kinds: no network, no such id, no permission, no space, ...
        raise FileNotFoundError(
            f"{argument}: expected a checkpoint folder or the id of a model on the Hugging Face Hub, got {path}: there is no such "
            f"folder, and {_hub_reason(error, revision)}"
        ) from error


def require_no_revision(path: str | Path, revision: str | None) -> None:
    """Raises ValueError for a revision of what is not on the Hub."""
    if revision is not None:
        what = "folder" if Path(path).is_dir() else "file"
        raise ValueError(f"revision: expected None for {path}, which is a {what} here and not on the Hub, got {revision!r}")


def _hub_reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    reasons = (
        (errors.GatedRepoError, "access must be asked for on its page on the Hub, and then a login: hf auth login"),
        (errors.RepositoryNotFoundError, "the Hub has no such model, or it is private and needs a login: hf auth login"),
        (errors.RevisionNotFoundError, f"the Hub has no revision {revision!r} of it"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached, and it has not been downloaded before"),
        (errors.OfflineModeIsEnabled, "the Hub is not asked in offline mode (HF_HUB_OFFLINE)"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    lines = str(error).strip().splitlines()
    return f"the Hub failed: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
