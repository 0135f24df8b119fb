"""Files that complete a tokenizer: special tokens, added tokens, end-of-sequence ids, chat templates."""

import shutil
from pathlib import Path
from typing import Any

import tokenizers

from fastgpt import folders
from fastgpt.checks import require_integer
from fastgpt.text.vocabularies import find, read_json, read_text

COMPANIONS = (  # what a checkpoint has beside its tokenizer.json, into which added tokens have gone
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "generation_config.json",
)  # fmt: skip
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def read_special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """Special tokens: name -> token."""
    result = {}
    for source in (read_json(folder, "special_tokens_map.json"), config):
        for name, token in source.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                result[name] = token
    return result


def add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict, special_tokens: dict[str, str]) -> None:
    """Adds tokens that are not in the vocabulary, and marks the special ones."""
    special = list(special_tokens.values())
    for source in (read_json(folder, "special_tokens_map.json"), config):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(name)
            listed = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
            special += [token["content"] if isinstance(token, dict) and "content" in token else token for token in listed]
    special = [token for token in dict.fromkeys(token for token in special if isinstance(token, str)) if token]

    declared = {}  # id -> token; later files override earlier ones
    path = folder / "added_tokens.json"
    for content, index in read_json(folder, path.name).items():
        declared[_added_id(path, index)] = tokenizers.AddedToken(
            content, special=content in special, normalized=content not in special
        )
    path = folder / "tokenizer_config.json"
    entries = config.get("added_tokens_decoder") or {}
    for index, entry in entries.items() if isinstance(entries, dict) else [(None, entries)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not index:
            raise ValueError(
                f"tokenizer: {path} is damaged: added_tokens_decoder: expected ids with a dict that has a content each, "
                f"got {shown({index: entry})}"
            )
        flags = {flag: entry[flag] is True for flag in TOKEN_FLAGS if flag in entry}
        declared[_added_id(path, index)] = tokenizers.AddedToken(entry["content"], **flags)

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    lacking = {index: token for index, token in sorted(declared.items()) if token.content and token.content not in added}
    new = [index for index, token in lacking.items() if backend.token_to_id(token.content) is None]
    backend.add_tokens(list(lacking.values()))
    for index in new:
        if (got := backend.token_to_id(lacking[index].content)) != index:
            raise ValueError(
                f"tokenizer: {folder}: expected added tokens that follow on the vocabulary, {lacking[index].content!r} has the "
                f"id {index} instead of {got}"
            )
    added |= {token.content for token in lacking.values()}
    known = [token for token in special if token not in added and backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in known])


def _added_id(path: Path, index: Any) -> int:
    try:
        return require_integer("id", int(index) if isinstance(index, str) else index, 0, 2**31)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is damaged: an added token: {error}") from error


def read_chat_templates(folder: Path, config: dict) -> str | dict[str, str] | None:
    """The only template, or several by name."""
    path = folder / "tokenizer_config.json"
    stored = config.get("chat_template")
    if isinstance(stored, list):  # several, by name
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in stored):
            raise ValueError(f"tokenizer: {path} is damaged: chat_template: expected dicts with name and template")
        stored = [(entry["name"], entry["template"]) for entry in stored]
    elif isinstance(stored, dict):
        stored = list(stored.items())
    else:
        stored = [("default", stored)] if stored is not None else []
    if not all(isinstance(part, str) for entry in stored for part in entry):
        raise ValueError(f"tokenizer: {path} is damaged: chat_template: expected texts, by name, got {shown(stored)}")
    templates = dict(stored)
    if (default := find(folder, "chat_template.jinja")) is not None:
        templates["default"] = read_text(default)
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        if find(folder, path.relative_to(folder)) is not None:
            templates[path.stem] = read_text(path)
    return templates.get("default") if templates.keys() <= {"default"} else templates


def read_eos_ids(folder: Path) -> list[int]:
    """The ids of end-of-sequence tokens, in the vocabulary or not."""
    generation = read_json(folder, "generation_config.json")
    path, config = folder / "generation_config.json", generation
    if "eos_token_id" not in generation:
        path = folder / "config.json"
        config = read_json(folder, path.name)
    stored = config.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"tokenizer: {path} is damaged: eos_token_id: expected ids, got {shown(stored)}")
    return [token for token in ids if token >= 0]


def shown(value: Any) -> str:
    """The repr of a value for an error, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def copy_companions(source: Path, target: Path, argument: str = "model") -> None:
    """Copies what a checkpoint's folder has beside its tokenizer.json into another.

    Args:
        argument: the name that errors begin with.

    Raises: ValueError for a link out of the folder; OSError.
    """
    for name in (path.relative_to(source) for pattern in COMPANIONS for path in source.glob(pattern)):
        if (file := folders.find(source, name, argument)) is not None:
            (target / name).parent.mkdir(exist_ok=True)
            with folders.replacing(target / name) as copy:
                shutil.copyfile(file, copy)
