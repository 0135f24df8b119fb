"""The command `fastgpt`: its parser, and how errors are reported."""

import argparse
import re
import shlex
import sys
from importlib import import_module
from typing import Any, NoReturn

import torch

import fastgpt
from fastgpt import startup
from fastgpt.cli.arguments import Parser
from fastgpt.cli.output import discard_stdout, is_of_stdout, print_stderr
from fastgpt.model.inputs import PromptTooLong

COMMANDS = {  # a module beside this one each
    "generate": "continue a prompt",
    "chat": "have a conversation with a chat model",
    "embed": "embed sentences by an encoder",
    "fill": "fill the masks of a text by an encoder",
    "inspect": "show the tokens of a prompt and the predictions for the next one",
    "quantize": "write a model with matrices of 8 or 4 bits, as a folder or a GGUF file",
    "train": "train a model on a text file",
    "bench": "measure the speed of generation and its operations, in two minutes",
    "info": "show versions, devices, and which implementation each operation uses; or what is in a model",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 2 and one line on bad input, 130 on Ctrl-C.

    Args:
        arguments: default those of the process.
    """
    options = argparse.Namespace()
    try:
        options, unknown = parser().parse_known_args(arguments)
        if unknown:
            options.parser.refuse(unknown)
        options.run(options)
        print(end="", flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        discard_stdout()
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = error_message(error, options)
        if isinstance(error, OSError) and is_of_stdout(error):
            discard_stdout()
            message = f"standard output cannot be written to: {error.strerror}"
        print_stderr(f"fastgpt: error: {message}")
        sys.exit(2)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print_stderr(f"fastgpt: error: out of memory: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        print_stderr("\nfastgpt: interrupted")
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="fastgpt", description=fastgpt.__doc__, epilog="fastgpt COMMAND --help shows the options of a command.")
    top.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, meaning in COMMANDS.items():
        commands.add_parser(name, help=meaning, module=f"fastgpt.cli.{name}")
    return top


class CommandParser(Parser):
    """The parser of one command. Its module is imported when the command is chosen: each loads libraries of its own, and
    `fastgpt --help` need not wait for all of them.

    Args:
        module: its name. It has `add_arguments(parser)`, and `run(options)`.
    """

    def __init__(self, *, module: str, **options):
        super().__init__(**options)
        self.module, self.is_loaded = module, False

    def load(self) -> None:
        """Adds the command's options."""
        if self.is_loaded:
            return
        startup.watch()
        try:
            module = import_module(self.module)
        finally:
            startup.unwatch()
        module.add_arguments(self)
        self.set_defaults(run=module.run, parser=self)
        self.is_loaded = True

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Reports arguments that are not the command's; of an option that is named as a positional argument, says that it is one."""
        positional = {f"--{action.metavar}".lower(): action.metavar for action in self._get_positional_actions()}
        for argument in unknown:
            option = argument.partition("=")[0]
            if option in positional:
                self.error(f"{option}: expected {positional[option]} itself, which has no option, got {argument}")
        self.error(f"unrecognized arguments: {' '.join(unknown)}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.load()
        return super().parse_known_args(args, namespace)


def error_message(error: Exception, options: argparse.Namespace) -> str:
    """The message of an error in terms of the command line: the argument that it begins with becomes the option of that name,
    if the command has one, and so do NAME=VALUE further on; texts[0] becomes text 1; "expected None" becomes "expected none", and
    "or None", which only Python can pass, is left out."""
    message = startup.sentence(error)
    if isinstance(error, PromptTooLong):
        message += " (--model)"
    known = getattr(getattr(options, "parser", None), "_option_string_actions", {})

    def option(match: re.Match) -> str:
        if match[1] is None:
            return match[0]
        name = "--" + match[1].replace("_", "-")
        value = shlex.quote(match[2].strip("'"))
        return match[0] if name not in known else name if value == "True" else f"{name} {value}"

    name, colon, rest = message.partition(":")
    if not colon:
        return message
    rest = re.sub(r"(?<!\w)'[^']*'|\b([a-z_]+)=(True|'[^']*'|[0-9.]+)", option, rest)  # but not in what was given
    if text := re.fullmatch(r"texts\[([0-9]+)\]", name):
        return f"text {int(text[1]) + 1}:{rest}"
    if (typed := "--" + name.replace("_", "-")) not in known:
        return f"{name}:{rest}"
    rest = re.sub("^ expected None\\b", " expected none", rest)
    return f"{typed}:" + re.sub("^((?:(?!, got ).)*) or None, got ", r"\1, got ", rest)
