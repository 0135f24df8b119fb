"""Prompts: from the command line, files and standard input."""

import io
import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastgpt.checks import from_torchrun, is_terminal
from fastgpt.text.tokenizer import Tokenizer

DEFAULT_PROMPT = "\n"  # where the shipped model's text begins a new speech, and most texts a new line


def read_prompts(
    prompts: Sequence[str], files: Iterable[str] = (), lines_of: str | None = None, option: str = "prompts"
) -> list[str]:
    """The texts to continue: those of the command line, where - is standard input, then those of files, then the lines of a file;
    or else what is piped into standard input. [] where there is none. option: the name of that of lines_of."""
    if prompts.count("-") > 1:
        raise ValueError("prompt: expected - once, since there is one standard input, got it several times")
    texts = [read_prompt(prompt) for prompt in prompts]
    texts += map(_read_file, files)
    if lines_of is not None:
        lines = [line for line in _read_file(lines_of, option).split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{option}: expected at least one line with text, {lines_of} has none")
        texts += lines
    if not texts and (text := _piped_in()):
        texts = [text]
    return texts


def read_prompt(prompt: str) -> str:
    """A prompt of the command line, or standard input for -."""
    if prompt == "-":
        return _standard_input()
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that Python has made surrogates of
        _decoded("prompt", "it", os.fsencode(prompt))
    return prompt


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line break, or the first character of a character-level vocabulary without one."""
    try:
        return DEFAULT_PROMPT if tokenizer.encode(DEFAULT_PROMPT) else tokenizer.decode([0])
    except ValueError:
        return tokenizer.decode([0])


def _piped_in() -> str:
    """Standard input if it is a pipe or a file, not a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return _standard_input() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""
    except io.UnsupportedOperation:  # it is no file of the system's, but what the caller of `main` put there
        return "" if is_terminal(sys.stdin) else _standard_input()
    except AttributeError:  # there is none
        return ""


def _standard_input() -> str:
    if (from_torchrun("WORLD_SIZE") or 1) > 1:
        raise ValueError("prompt: expected a text or --prompt-file for several processes, which share standard input, got -")
    try:
        content = getattr(sys.stdin, "buffer", sys.stdin).read()
    except (AttributeError, OSError):  # there is none, or it cannot be read
        return ""
    return _decoded("prompt", "standard input", content.encode() if isinstance(content, str) else content)


def _read_file(path: str, name: str = "prompt_file") -> str:
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: expected a file to read, got {path}: {reason}") from error
    text = _decoded(name, path, content)
    if not text:
        raise ValueError(f"{name}: expected at least one character, {path} is empty")
    return text


def _decoded(name: str, source: str, content: bytes) -> str:
    """A prompt in UTF-8, without the line break that ends it, unless it is nothing else. Line breaks become line feeds, as in
    a text that is trained on."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected text in UTF-8, {source} has the byte {content[error.start]:#04x} at {error.start}"
        ) from error
    text = re.sub("\r\n?", "\n", text)
    return text.removesuffix("\n") or text
