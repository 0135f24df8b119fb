"""`fastgpt chat`: a conversation with a chat model in the terminal, or line by line from a pipe."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from fastgpt.checks import is_terminal, require_integer
from fastgpt.cli.arguments import (
    CACHE_DTYPES,
    DTYPES,
    SAMPLING,
    add_cache_dtype,
    add_loading,
    add_sampling,
    add_speculation,
    add_stop,
    add_template_variables,
    device_of,
    integer,
    require_read,
    template_variables,
    unescape,
)
from fastgpt.cli.arguments import speculation as speculation_of
from fastgpt.cli.draft import draft_model
from fastgpt.cli.output import print_stderr
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.conversation import MAX_NEW_TOKENS, Conversation
from fastgpt.generation.pipeline import pipeline

DESCRIPTION = """\
A conversation with a chat model, which is streamed; keys and values of earlier turns stay in the cache. Ctrl-C stops an answer,
/help shows the commands, Ctrl-D ends. From a pipe, each line is a turn. Options that are not given are those of the checkpoint's
generation_config.json, or else the defaults in parentheses."""
EXAMPLES = """\
examples:
  fastgpt chat --model PATH_OR_ID --speculate
  fastgpt chat --model PATH_OR_ID --system "You are brief." --temperature 0.7
  printf 'Name a river.\\nAnother one?\\n' | fastgpt chat --model PATH_OR_ID"""
COMMANDS = """\
/reset       begin again
/undo        take back the last turn
/save FILE   write the messages as JSON
/load FILE   go on with the messages of a file
/exit        end, as Ctrl-D does
//TEXT       say /TEXT"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add = parser.add_argument_group("conversation").add_argument
    add("--system", metavar="TEXT", help="a system message")
    add("--max-new-tokens", type=integer, metavar="N", help=f"the most tokens of an answer ({MAX_NEW_TOKENS:,})")
    add_stop(add)
    add_template_variables(add)

    add_sampling(parser, "of every answer (a random one for each)")

    add = parser.add_argument_group("model and device").add_argument
    add_loading(add, default=None)
    add_cache_dtype(add)
    add_speculation(parser)


def run(options: argparse.Namespace) -> None:
    settings = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if options.cache_dtype is not None:
        settings["cache_dtype"] = CACHE_DTYPES[options.cache_dtype]
    speculates = speculation_of(options)
    GenerationConfig(**settings, **speculates)  # so that errors come before anything is loaded
    require_integer("max_new_tokens", options.max_new_tokens, least=1, optional=True)
    stop, device = [unescape(text, "stop") for text in options.stop], device_of(options.device)
    variables = template_variables(options)
    pipe = pipeline(
        options.model, revision=options.revision, dtype=DTYPES.get(options.dtype), device=device, weights=options.weights,
        lora=options.lora, decoder_only=True,
    )  # fmt: skip
    if pipe.tokenizer.chat_template is None:
        raise ValueError(f"model: expected one with a chat template, made for chats; {options.model} has none")
    require_read(variables, pipe.tokenizer)
    if options.draft is not None:
        speculates["speculate"] = draft_model(options, pipe.model, device)
    chat = pipe.conversation(
        options.system, max_new_tokens=options.max_new_tokens, stop=stop, template_variables=variables, **settings, **speculates
    )
    interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if interactive:
        print_stderr("/help shows the commands; Ctrl-C stops an answer, Ctrl-D ends.")
    for line in from_terminal() if interactive else from_pipe():
        text = line.strip()
        if text == "/exit":
            return
        if text.startswith("/") and not text.startswith("//"):
            print_stderr(command(chat, text))
        elif text:
            answer(chat, text[1:] if text.startswith("//") else text)


def from_terminal() -> Iterator[str]:
    """Lines that are typed, with a history."""
    with contextlib.suppress(ImportError):  # it is not part of every Python
        import readline  # noqa: F401  # from now on, input() has a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print_stderr("\n(Ctrl-D or /exit ends)")


def from_pipe() -> Iterator[str]:
    for count, line in enumerate(sys.stdin or (), 1):
        try:
            line.encode()
        except UnicodeEncodeError:  # Python has decoded what is not UTF-8 as lone surrogates
            raise ValueError(f"standard input: expected UTF-8, got other bytes in line {count}") from None
        yield line


def command(chat: Conversation, text: str) -> str:
    """Does what a command says. Returns what to tell the user."""
    name, _, argument = text.partition(" ")
    if name == "/reset":
        chat.reset()
        return "(conversation reset)"
    if name == "/undo":
        return "(took back the last turn)" if chat.undo() else "(there is no turn to take back)"
    if name in ("/save", "/load"):
        return save_or_load(chat, name, argument.strip())
    return COMMANDS if name == "/help" else f"({name}: expected one of these commands)\n{COMMANDS}"


def save_or_load(chat: Conversation, name: str, file: str) -> str:
    if not file:
        return f"({name} FILE: expected the name of a file)"
    saves = name == "/save"
    try:
        (chat.save if saves else chat.load)(Path(file).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError of a home that nobody has
        return f"({name} FILE: {str(error).removeprefix('path: ')})"
    return f"({'wrote' if saves else 'read'} {len(chat.messages)} messages {'to' if saves else 'from'} {file})"


def answer(chat: Conversation, text: str) -> None:
    """Prints the answer as it is generated, and then its speed."""
    with stopping(chat):
        try:
            pieces = chat.stream(text)
        except ValueError as error:  # of this turn, which is taken back: the text is too long, or the template refuses it
            return print_stderr(f"({error})")
        if chat.dropped:
            print_stderr(f"(the context is full: dropped the oldest {chat.dropped} messages)")
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)
    print_stderr(f"({speed(chat)})")


def speed(chat: Conversation) -> str:
    count = len(chat.tokens)
    parts = [f"read {chat.read:,}", f"{count:,} token{'' if count == 1 else 's'}"]
    if chat.tokens_per_second is not None:
        parts.append(f"{chat.tokens_per_second:,.1f} tok/s")
    if chat.tokens_per_pass is not None and "speculate" in chat.options:
        parts.append(f"{chat.tokens_per_pass:.2f} tokens a pass")
    if chat.finish_reason in ("stopped", "length"):
        parts.append(str(chat.finish_reason))
    return ", ".join(parts)


@contextlib.contextmanager
def stopping(chat: Conversation) -> Iterator[None]:
    """Within it, Ctrl-C ends the answer after its current step; pressed again, it is an interrupt as usual."""
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return

    def stop(number, frame):
        signal.signal(signal.SIGINT, before)
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
