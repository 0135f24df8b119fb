"""Parsers, and the types of options that several commands have."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastgpt.checkpoints.loading import MATRICES
from fastgpt.folders import SHIPPED_MODEL

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHE_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
# Options of `fastgpt.generate` that commands have by the same names.
SAMPLING = ("logit_bias", "repetition_penalty", "no_repeat_ngram_size", "temperature", "top_k", "top_p", "min_p", "seed")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}


class Formatter(argparse.HelpFormatter):
    """Keeps the lines of examples, fits all else to the terminal, and gives long option names room."""

    def __init__(self, prog: str, **options):
        super().__init__(prog, max_help_position=32, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of commands are."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastgpt: error: {re.sub('^argument ', '', message)} (see {self.prog} --help)\n")


def integer(text: str) -> int:
    return _parsed(int, "an integer", text)


def number(text: str) -> float:
    return _parsed(float, "a number", text)


def _parsed(type_: Callable[[str], Any], expected: str, text: str) -> Any:
    try:
        return type_(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def path_or_id(text: str) -> str:
    """A path as it is given, or the id of a model on the Hub."""
    if not text:  # which would be the current directory
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return text


def path(text: str) -> Path:
    return Path(path_or_id(text))


def unescape(text: str, name: str = "text") -> str:
    r"""Replaces the escapes \n, \r, \t, \\, \0, \xNN, \uNNNN and \UNNNNNNNN by their characters, since a shell does not.

    A backslash before anything else stays. For options such as --stop.

    Args:
        name: of the option, for errors.

    Raises: ValueError for an escape of no character.
    """

    def character(escape: re.Match) -> str:
        code = escape[1]
        return ESCAPES[code] if code in ESCAPES else chr(int(code[1:], 16))

    try:
        result = re.sub(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[nrt0\\])", character, text)
        return result.encode("utf-16", "surrogatepass").decode("utf-16")  # \uD83D\uDE00 is one character
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected escapes of characters, got {text!r}") from error


def add_model(add: Callable, default: Path | None = SHIPPED_MODEL) -> None:
    """Adds the options that say which model runs where.

    Args:
        add: `add_argument` of a parser or of a group.
        default: the shipped model, or None if one must be named.
    """
    add("--model", type=path_or_id, default=default, required=default is None, metavar="PATH_OR_ID", help="checkpoint folder, GGUF "
        "file, or the id of a model on the Hugging Face Hub" + (" (the shipped model)" if default else ""))  # fmt: skip
    add("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub (its main branch)")
    add_device(add)


def add_loading(add: Callable, default: Path | None = SHIPPED_MODEL) -> None:
    """Adds the options of `add_model`, and those that say how its weights are loaded."""
    add_model(add, default)
    add_weights(add)
    add("--lora", type=path_or_id, metavar="DIR", help="a LoRA adapter of the model, as PEFT and fastgpt train --lora save it")


def add_weights(add: Callable) -> None:
    """Adds the options that say in which types weights are loaded."""
    add("--dtype", choices=DTYPES, metavar="D", help=f"dtype of the weights: {', '.join(DTYPES)} (as stored)")
    add("--weights", choices=MATRICES, metavar="D", help=f"load the matrices as {', '.join(MATRICES)} (as stored)")


def add_cache_dtype(add: Callable) -> None:
    add("--cache-dtype", choices=CACHE_DTYPES, metavar="D", help=f"quantize the cache to {' or '.join(CACHE_DTYPES)} (the "
        "dtype of the weights)")  # fmt: skip


def add_stop(add: Callable) -> None:
    add("--stop", action="append", default=[], metavar="TEXT", help=r"stop before TEXT, in which \n is a line break, \t a tab "
        r"and \\ a backslash; can be repeated")  # fmt: skip


def add_template_variables(add: Callable, condition: str = "") -> None:
    add("--template-var", action="append", default=[], metavar="NAME=VALUE", help=f"{condition}a variable of the chat "
        "template, such as enable_thinking=false; VALUE is JSON, or else a string; can be repeated")  # fmt: skip


def template_variables(options: argparse.Namespace) -> dict[str, object]:
    """The variables that `add_template_variables` has taken."""
    return dict(map(template_variable, options.template_var))


def require_read(variables: dict[str, object], tokenizer: Any) -> None:
    """Raises ValueError for a variable that the chat template does not read."""
    if variables and (unread := tokenizer.unread_variables(variables)):
        raise ValueError(
            f"template-var: expected variables that the model's chat template reads, got {', '.join(unread)}, which it does not"
        )


def template_variable(argument: str) -> tuple[str, object]:
    """NAME=VALUE as a name and the value, which is JSON, or else the string as it is."""
    name, sign, value = argument.partition("=")
    if not sign or not name.isidentifier():
        raise ValueError(f"template-var: expected NAME=VALUE, got {argument!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def add_sampling(parser: argparse.ArgumentParser, seed: str) -> None:
    """Adds the options that choose tokens, `SAMPLING`. seed: what the seed is of, and what it is by default."""
    add = parser.add_argument_group("sampling, in this order").add_argument
    add("--logit-bias", type=logit_bias, metavar="JSON", help="numbers to add to the logits of tokens: '{\"ID\": NUMBER, "
        "...}'; -Infinity bans a token")  # fmt: skip
    add("--repetition-penalty", type=number, metavar="X", help="above 1, penalizes tokens that are already in the text (1)")
    add("--no-repeat-ngram-size", type=integer, metavar="N", help="never repeat a sequence of N tokens; 0 is off (0)")
    add("--temperature", type=number, metavar="T", help="0 is greedy decoding; otherwise tokens are sampled, from logits "
        "divided by T (0)")  # fmt: skip
    add("--top-k", type=integer, metavar="K", help="sample from the K most likely tokens (all)")
    add("--top-p", type=number, metavar="P", help="sample from the fewest most likely tokens of total probability P (all)")
    add("--min-p", type=number, metavar="P", help="sample from tokens at least P times as likely as the most likely one (all)")
    add("--seed", type=integer, metavar="S", help=f"seed {seed}")


def logit_bias(text: str) -> dict[int, float]:
    def by_token(pairs: list) -> dict[int, float]:
        result = {int(token): value for token, value in pairs}
        if len(result) < len(pairs):
            raise ValueError("a token is there twice")
        return result

    try:
        result = json.loads(text, object_pairs_hook=by_token)
        if not isinstance(result, dict):
            raise ValueError(f"got a {type(result).__name__}")
        return result
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f'expected a JSON object of token ids and numbers, such as \'{{"12": -5, "7": -Infinity}}\', got {text!r}'
        ) from None


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Adds the options of speculation."""
    add = parser.add_argument_group("speculation, which changes no token").add_argument
    add("--speculate", action="store_true", help="guess next tokens from the text so far, and check several in one pass")
    add("--draft", type=path_or_id, metavar="PATH_OR_ID", help="let this smaller model of the same vocabulary guess instead")
    add("--speculate-tokens", type=integer, metavar="N", help="the most guesses in a pass, from 1 to 7 (as many as pay)")


def speculation(options: argparse.Namespace) -> dict:
    """The options of `generate` for what `add_speculation` has added, with "prompt" in place of a draft model yet to load.

    Raises: ValueError for options without effect.
    """
    if options.speculate and options.draft is not None:
        raise ValueError("speculate: expected --speculate or --draft, got both")
    if not options.speculate and options.draft is None:
        if options.speculate_tokens is not None:
            raise ValueError("speculate-tokens: expected --speculate or --draft with it, got --speculate-tokens alone")
        return {}
    return {"speculate": "prompt", "speculate_tokens": options.speculate_tokens}


def add_device(add: Callable) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, metavar="D", help=f"cpu, cuda, cuda:1, ... ({default})")


def device_of(name: str) -> torch.device:
    """The device of that name. Raises ValueError for one that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA GPU"
            raise ValueError(f"device: expected one of this machine, got {name!r}, but {why}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    return device
