"""The command line: fastgpt generate | inspect | train | bench | info."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import fastgpt
from fastgpt import folders
from fastgpt.bench import suite
from fastgpt.bench.timing import implementation
from fastgpt.cache.create import CACHE_KINDS
from fastgpt.checkpoints import hub
from fastgpt.checks import is_terminal, require_integer, require_number
from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation.config import MAX_NEW_TOKENS, GenerationConfig
from fastgpt.generation.decoding import decoding
from fastgpt.generation.pipeline import Pipeline, Run, as_messages, pipeline
from fastgpt.model import inspection
from fastgpt.model.config import GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_states import require_causal
from fastgpt.model.inputs import PromptTooLong, require_room
from fastgpt.ops.library import CUDA_MISSING
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.config import DTYPES as TRAIN_DTYPES
from fastgpt.training.config import TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.processes import PARALLEL, joined, own_device
from fastgpt.training.run_folder import claimed, require_new_run
from fastgpt.training.trainer import Trainer, pretrained

DEFAULT_PROMPT = "\n"  # where the shipped model's text begins a new speech, and most texts a new line
CACHE_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
TOKENIZER_FILES = (  # what a checkpoint has beside its tokenizer.json, into which added tokens have gone
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "generation_config.json",
)  # fmt: skip
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_OPTIONS = {"prompt", "prompts", "given", "run", "parser"}  # what there is in the parsed arguments beside them
OUTPUT_ERRORS = {errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT}  # of a stream, which has no name: of the file behind it


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 2 and one line on bad input, 130 on Ctrl-C."""
    options = argparse.Namespace()
    try:
        options, unknown = parser().parse_known_args(arguments)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        options.run(options)
        print(end="", flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the exit's flush complain
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS and error.filename is None and sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error = OSError(f"output: expected one that can be written to, got {error.strerror}")
        report(f"fastgpt: error: {as_typed(error, options)}")
        sys.exit(2)
    except (MemoryError, torch.OutOfMemoryError) as error:
        report(f"fastgpt: error: out of memory: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        report("\nfastgpt: interrupted")
        sys.exit(130)


def as_typed(error: Exception, options: argparse.Namespace) -> str:
    """What a library says about an argument, for one who types options: that name, with which its message begins, as an option
    of this command, if it is one; and without the None that only Python can say."""
    message = str(error)
    if isinstance(error, PromptTooLong):
        message += " (--model)"
    name, colon, rest = message.partition(":")
    if not colon or name.replace("-", "_") not in vars(options).keys() - NO_OPTIONS:
        return message
    return f"--{name.replace('_', '-')}:" + re.sub("^((?:(?!, got ).)*) or None, got ", r"\1, got ", rest)


def report(line: str) -> None:
    """Prints on standard error, or nowhere where there is none: in a program without a console, a daemon."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line that begins with the option, as other errors do."""
        self.exit(2, f"fastgpt: error: {re.sub('^argument ', '', message)} (see {self.prog} --help)\n")


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


def integer(text: str) -> int:
    return parsed(int, "an integer", text)


def number(text: str) -> float:
    return parsed(float, "a number", text)


def parsed(type_: type, expected: str, text: str):
    try:
        return type_(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def named(text: str) -> str:
    if not text:  # which would be the current directory
        raise argparse.ArgumentTypeError("expected the path of a file or a folder, got ''")
    return text


def path(text: str) -> Path:
    return Path(named(text))


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


GENERATE = """\
Continues a prompt and prints both, the text as it comes. What is not said here is what the checkpoint's
generation_config.json says, or else what is in parentheses below."""
GENERATE_EXAMPLES = """\
examples:
  fastgpt generate "ROMEO:" --temperature 0.8 --seed 1
  fastgpt generate "Who are you?" --model PATH_OR_ID --chat
  git diff | fastgpt generate --model PATH_OR_ID --stop "\\n\\n"
  fastgpt generate --prompt-file story.txt --json --logprobs"""


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="fastgpt", description=fastgpt.__doc__, epilog="fastgpt COMMAND --help says what a command can do.")
    top.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate", help="continue a prompt", usage="%(prog)s [options] [PROMPT ...]", formatter_class=Formatter,
        description=GENERATE, epilog=GENERATE_EXAMPLES,
    )  # fmt: skip
    command.set_defaults(run=run_generate, parser=command)
    add = command.add_argument_group("text").add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="the text to continue, or several texts; - is standard input, which is "
        "also read if there is no PROMPT and something is piped in (a line break)")  # fmt: skip
    add("--prompt-file", type=named, action="append", default=[], metavar="FILE", help="continue a text in UTF-8; may be given "
        "several times. Of FILE, and of standard input, one final line break is left out")  # fmt: skip
    add("--chat", action="store_true", help="PROMPT is a user's message, to be answered; only the answer is printed")
    add(
        "--template-var",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --chat: a variable of the chat "
        "template, enable_thinking=false say; VALUE is JSON, or else a text; may be given several times",
    )
    add("--max-new-tokens", type=integer, metavar="N", help=f"tokens to generate; by default no more than the context has room "
        f"for ({MAX_NEW_TOKENS})")  # fmt: skip
    add("--min-new-tokens", type=integer, metavar="N", help="no end of the text before there are so many (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help=r"end before TEXT, in which \n is a line break, \t a tab "
        r"and \\ a backslash; may be given several times")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after tokens that end a text")
    add("--num-samples", type=integer, metavar="N", help="so many texts for each prompt, printed when all are ready (1)")

    add = command.add_argument_group("choice of tokens, in this order").add_argument
    add("--logit-bias", type=logit_bias, metavar="JSON", help="added to the logits of tokens: '{\"ID\": NUMBER, ...}'; "
        "-Infinity forbids one")  # fmt: skip
    add("--repetition-penalty", type=number, metavar="X", help="above 1, penalizes tokens that are already there (1)")
    add("--no-repeat-ngram-size", type=integer, metavar="N", help="never the same N tokens in a row twice; 0 is no limit (0)")
    add("--temperature", type=number, metavar="T", help="0 takes the most likely token; above, they are sampled, from logits "
        "divided by T (0)")  # fmt: skip
    add("--top-k", type=integer, metavar="K", help="sample among the K most likely tokens (all)")
    add("--top-p", type=number, metavar="P", help="sample among the most likely tokens of total probability P (all)")
    add("--min-p", type=number, metavar="P", help="sample among tokens at least P times as likely as the most likely (all)")
    add("--seed", type=integer, metavar="S", help="makes sampling repeatable (one is drawn, and printed at the end)")

    add = command.add_argument_group("model and computation").add_argument
    add_model(add)
    add("--dtype", choices=DTYPES, metavar="D", help=f"of weights: {', '.join(DTYPES)} (as stored)")
    add("--cache", choices=CACHE_KINDS, metavar="KIND", help=f"of keys and values: {', '.join(CACHE_KINDS)} (contiguous)")
    add("--cache-dtype", choices=CACHE_DTYPES, metavar="D", help=f"of the cache: {', '.join(CACHE_DTYPES)} (the weights')")
    add("--window", type=integer, metavar="N", help="attend to the last N tokens only; a sliding cache keeps only these (all)")
    add("--no-cache", action="store_true", help="recompute everything at every step")

    add = command.add_argument_group("output").add_argument
    add("--compare-cache", action="store_true", help="generate with and without the cache, compare tokens and speed")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")
    add("--logprobs", action="store_true", help="with --json: each token and its log-probability")

    command = commands.add_parser(
        "inspect", help="what a model sees in a prompt", usage="%(prog)s [options] PROMPT", formatter_class=Formatter,
        description="Prints the tokens of a prompt and those that are most likely to follow.",
    )  # fmt: skip
    command.set_defaults(run=run_inspect, parser=command)
    add = command.add_argument
    add("prompt", metavar="PROMPT", help="the text to look at; - is standard input")
    add_model(add)
    add("--top", type=integer, default=10, metavar="N", help="how many next tokens to show (10)")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    add("--attention", type=path, metavar="FILE", help="save a picture of what attends to what: .png, .svg, .pdf, ...")
    add("--layer", type=integer, metavar="L", help="of the picture; the first is 0 (0)")
    add("--head", type=integer, metavar="H", help="of the picture; the first is 0 (0)")

    command = commands.add_parser("train", help="train a model on a text file", formatter_class=Formatter)
    command.set_defaults(run=run_train, parser=command)
    add = command.add_argument
    add("--text", type=path, required=True, metavar="FILE", help="the text, in UTF-8; its last 10%% is held out")
    add("--out", type=path, required=True, metavar="DIR", help="a new folder for checkpoints, or with --resume that of a run")
    add(
        "--resume",
        action="store_true",
        help="continue the run in DIR with its settings; of these, all but layers, heads, "
        "width, context, dropout and eval-windows may be given anew",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--init-from", type=named, metavar="PATH_OR_ID", help="go on from a checkpoint: its model and its tokenizer")
    add("--parallel", choices=PARALLEL, help="under torchrun, each process has the whole model (ddp) or a part (fsdp) (ddp)")
    add(
        "--accumulate",
        type=integer,
        default=1,
        metavar="N",
        help="compute a process's share of a batch in N parts, which takes less memory (1)",
    )
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        type_, metavar = {int: (integer, "N"), float: (number, "X"), str: (str, "D")}[field.type]  # type: ignore[index]  # types, not their names
        choices = TRAIN_DTYPES if field.name == "dtype" else None
        add(flag, type=type_, choices=choices, metavar=metavar, help=f"{field.metadata['meaning']} ({field.default})")

    command = commands.add_parser(
        "bench", help="how fast this machine is, in two minutes", formatter_class=Formatter,
        description="Times generation and its operations beside PyTorch's and this machine's limits.",
    )  # fmt: skip
    command.set_defaults(run=run_bench, parser=command)
    add = command.add_argument
    add_device(add)
    add("--only", default="", metavar="TEXT", help="what has TEXT in its name: GPT-2, attention, one token, ... (everything)")
    add("--seconds", type=number, default=90.0, metavar="S", help="to measure for; seven rounds of each at least (90)")
    add("--json", action="store_true", help="print one JSON object instead of the table")

    what = "versions, device, and which implementation serves each operation"
    command = commands.add_parser("info", help=what, formatter_class=Formatter, description=f"Prints {what}, and why.")
    command.set_defaults(run=run_info, parser=command)
    return top


def add_model(add) -> None:
    add("--model", type=named, default=SHIPPED_MODEL, metavar="PATH_OR_ID", help="checkpoint folder, or the id of one on the "
        "Hugging Face Hub (the shipped model)")  # fmt: skip
    add("--revision", metavar="REV", help="of a model on the Hub: a branch, a tag or a commit (its main branch)")
    add_device(add)


def add_device(add) -> None:
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=chosen, metavar="D", help=f"cpu, cuda, cuda:1, ... ({chosen})")


# Options of `generate` that have a flag of the same name.
FLAGS = (
    "logit_bias", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "temperature", "top_k", "top_p", "min_p",
    "seed", "num_samples", "cache", "window",
)  # fmt: skip


def unescape(text: str, name: str = "text") -> str:
    r"""What a shell passes on as written: \n, \r, \t, \\, \0, \xNN, \uNNNN, \UNNNNNNNN become the characters they stand for.

    A backslash before anything else stays. For options such as --stop.

    Args:
        name: of the option, for errors.

    Raises: ValueError for what is no character.
    """

    def character(escape: re.Match) -> str:
        code = escape[1]
        return ESCAPES[code] if code in ESCAPES else chr(int(code[1:], 16))

    try:
        result = re.sub(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[nrt0\\])", character, text)
        return result.encode("utf-16", "surrogatepass").decode("utf-16")  # \uD83D\uDE00 is one character
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected escapes of characters, got {text!r}") from error


def given_options(options) -> dict:
    """What `generate` is told, checked before anything is loaded; the rest is the checkpoint's to say."""
    given = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    if options.cache_dtype is not None:
        given["cache_dtype"] = CACHE_DTYPES[options.cache_dtype]
    given["return_logprobs"] = options.logprobs
    GenerationConfig(**given)
    require_integer("max_new_tokens", options.max_new_tokens, least=0, optional=True)
    given["stop"] = [unescape(text, "stop") for text in options.stop]
    if options.template_var:
        given["template_variables"] = dict(map(template_variable, options.template_var))
    return given | ({"eos": None} if options.ignore_eos else {})


def prompts_of(options) -> list[str]:
    """The texts to continue: of the command line, of files, of standard input; [] where there is none."""
    if options.prompt.count("-") > 1:
        raise ValueError("prompt: expected - once, since there is one standard input, got it several times")
    prompts = [given_prompt(prompt) for prompt in options.prompt]
    prompts += map(read_prompt, options.prompt_file)
    if not prompts and (text := piped_in()):
        prompts = [text]
    return prompts


def given_prompt(prompt: str) -> str:
    """A prompt of the command line, or standard input for -."""
    if prompt == "-":
        return standard_input()
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that Python has made surrogates of
        decoded("prompt", "it", os.fsencode(prompt))
    return prompt


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line break, or for a model of characters that knows none, the first of them."""
    try:
        return DEFAULT_PROMPT if tokenizer.encode(DEFAULT_PROMPT) else tokenizer.decode([0])
    except ValueError:
        return tokenizer.decode([0])


def piped_in() -> str:
    """Standard input if it is a pipe or a file, not a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return standard_input() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""
    except io.UnsupportedOperation:  # it is no file of the system's, but what the caller of `main` put there
        return "" if is_terminal(sys.stdin) else standard_input()
    except AttributeError:  # there is none
        return ""


def standard_input() -> str:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("prompt: expected a text or --prompt-file for several processes, which share standard input, got -")
    try:
        content = getattr(sys.stdin, "buffer", sys.stdin).read()
    except (AttributeError, OSError):  # there is none, or it cannot be read
        return ""
    return decoded("prompt", "standard input", content.encode() if isinstance(content, str) else content)


def read_prompt(path: str) -> str:
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"prompt_file: expected a file to read, got {path}: {reason}") from error
    text = decoded("prompt_file", path, content)
    if not text:
        raise ValueError(f"prompt_file: expected at least one character, {path} is empty")
    return text


def decoded(name: str, source: str, content: bytes) -> str:
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


def run_generate(options) -> None:
    if options.logprobs and not options.json:
        raise ValueError("logprobs: expected --json with it, got --logprobs alone")
    if options.template_var and not options.chat:
        raise ValueError("template-var: expected --chat with it, got --template-var alone")
    if options.no_cache and not options.compare_cache:
        for name in ("cache", "cache_dtype"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: expected none with --no-cache, got {getattr(options, name)}")
    options.given = given_options(options)
    options.prompts = prompts_of(options)
    device = device_of(own_device(options.device))
    with joined(None, device) as processes:  # one, unless torchrun started several
        pipe = pipeline(options.model, revision=options.revision, dtype=DTYPES.get(options.dtype), device=device)
        if processes.size > 1:
            from fastgpt.parallel import tensor_parallel  # slow to load

            tensor_parallel(pipe.model)
        options.prompts = options.prompts or [default_prompt(pipe.tokenizer)]
        if options.seed is None:  # one for both ways of --compare-cache, and for all processes
            options.given["seed"] = processes.agreed(int.from_bytes(os.urandom(4), "big"))
        if processes.first:
            generate_text(pipe, options, device)
        else:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
                generate_text(pipe, options, device)


def generate_text(pipe: Pipeline, options, device: torch.device) -> None:
    if options.chat and pipe.tokenizer.chat_template is None:
        which = "the shipped model" if options.model == SHIPPED_MODEL else options.model
        raise ValueError(f"chat: expected a --model with a chat template, {which} has none")
    run = run_generation(pipe, options, use_cache=not options.no_cache, quiet=options.json)
    if run.options.num_samples > 1 and run.options.temperature == 0:
        report("fastgpt: the samples of a prompt are all the same at temperature 0: choose a --temperature above it")
    longest, context = max(map(len, run.prompts)), pipe.model.config.context_length
    if options.max_new_tokens is None and longest == context:
        report(f"fastgpt: a prompt of {longest:,} tokens fills the model's context: there is no room for new ones")
    result = texts(pipe, run, options) | {
        "prompt_tokens": sum(map(len, run.prompts)),
        "new_tokens": sum(len(row.tokens) for row in run.rows),
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "decode_tokens_per_second": run.tokens_per_second,
        "seed": options.given["seed"] if run.options.temperature > 0 else None,  # where something is sampled
        "device": str(device),
        "dtype": str(pipe.model.token_embedding.weight.dtype).removeprefix("torch."),
        "implementation": implementation(fastgpt.explain(fastgpt.attention, *example_calls(device)[fastgpt.attention])),
    }
    if options.compare_cache:
        other = run_generation(pipe, options, use_cache=options.no_cache, quiet=True)
        cached, uncached = (other, run) if options.no_cache else (run, other)
        agree = [row.tokens for row in cached.rows] == [row.tokens for row in uncached.rows]
        result["decode_tokens_per_second"] = cached.tokens_per_second
        result["uncached_tokens_per_second"] = uncached.tokens_per_second
        result["speed_up"] = ratio(cached.tokens_per_second, uncached.tokens_per_second)
        result["tokens_agree"] = agree
    if options.json:
        print(json.dumps(result))
    elif options.compare_cache:
        print(f"\ncached: {shown(result['decode_tokens_per_second'])} tok/s")
        print(f"uncached: {shown(result['uncached_tokens_per_second'])} tok/s")
        print(f"speed-up: {shown(result['speed_up'])}x")
        rounded = "" if agree or options.cache_dtype is None else f", which is rounded to {options.cache_dtype}"
        print(f"tokens: {'the same' if agree else 'NOT the same'} with and without the cache{rounded}")
    else:
        tokens, speed, seed = result["new_tokens"], result["decode_tokens_per_second"], result["seed"]
        print(end="", flush=True)  # the text comes first where both go to one place; there may be no sys.stdout
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        parts += [] if speed is None else [f"{shown(speed)} tok/s"]
        report(", ".join(parts + ([] if seed is None else [f"seed {seed}"])))
    if options.compare_cache and not agree and options.cache_dtype is None:  # rounded to 8 bits, they may differ
        sys.exit(1)


def run_generation(pipe: Pipeline, options, *, use_cache: bool, quiet: bool) -> Run:
    """Generates as the options say; unless quiet, prints prompt and text, as it comes if there is one text only."""
    prompts = [as_messages(prompt) if options.chat else prompt for prompt in options.prompts]
    run = pipe.start(prompts, options.max_new_tokens, use_cache=use_cache, **options.given)
    befores = printed_before(run, options)
    streams = len(befores) == 1 and not quiet
    if streams:
        print(befores[0], end="", flush=True)
    for pieces in run:
        if streams:
            print(pieces[0], end="", flush=True)
    if streams:
        print()
    elif not quiet:
        texts = [before + row.text for before, row in zip(befores, run.rows)]
        heads = [shortened(prompt) for prompt in options.prompts for _ in range(run.options.num_samples)]
        print(
            "\n".join(
                f"--- {number} of {len(texts)}: {head}\n{text}\n" for number, (head, text) in enumerate(zip(heads, texts), 1)
            ),
            end="",
        )
    return run


def shortened(prompt: str) -> str:
    """The beginning of a prompt, in one line."""
    return repr(prompt if len(prompt) <= 40 else prompt[:39] + "…")


def printed_before(run: Run, options) -> list[str]:
    """What goes before each text: its prompt, but for chats."""
    return ["" if options.chat else prompt for prompt in options.prompts for _ in range(run.options.num_samples)]


def template_variable(argument: str) -> tuple[str, object]:
    """NAME=VALUE as a name and the value, which is JSON, or else the text as it stands."""
    name, sign, value = argument.partition("=")
    if not sign or not name.isidentifier():
        raise ValueError(f"template-var: expected NAME=VALUE, got {argument!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def texts(pipe: Pipeline, run: Run, options) -> dict:
    """What was generated, for --json: of the one text, or a list in `samples`, those of the first prompt first."""
    result = []
    for before, row in zip(printed_before(run, options), run.rows):
        result.append({"text": before + row.text, "finish_reason": row.finish_reason})
        if options.logprobs:
            names = map(pipe.tokenizer.backend.id_to_token, row.tokens)
            entries = zip(row.tokens, names, row.logprobs)
            result[-1]["tokens"] = [{"id": token, "token": name, "logprob": logprob} for token, name, logprob in entries]
    return result[0] if len(result) == 1 else {"samples": result}


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def shown(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}"


def run_inspect(options) -> None:
    """Tokens -> logits -> probabilities -> next token."""
    require_integer("top", options.top, least=1)
    for name in ("layer", "head"):
        if getattr(options, name) is None:
            setattr(options, name, 0)
        elif options.attention is None:
            raise ValueError(f"{name}: expected --attention with it, got --{name} alone")
    text = given_prompt(options.prompt)
    folder = hub.resolve(options.model, options.revision)
    model = GPT.from_pretrained(folder, device=device_of(options.device))
    require_causal(model.config)
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tokenizer.encode(text)
    if not prompt:
        raise ValueError("prompt: expected at least one character, got an empty prompt")
    require_room("prompt", len(prompt), model.config)
    texts = [inspection.text_of(tokenizer, *pair) for pair in zip(prompt, [None, *prompt])]
    ids = torch.tensor([prompt], device=model.token_embedding.weight.device)
    with torch.no_grad():
        if options.attention is None:
            logits = model.logits(model.hidden(ids, last_only=True))
        else:
            for name, count in (("layer", model.config.num_layers), ("head", model.config.num_heads)):
                if not 0 <= getattr(options, name) < count:
                    raise ValueError(f"{name}: expected a number from 0 to {count - 1}, got {getattr(options, name)}")
            logits, activations = inspection.run_with_cache(model, ids)
            pattern = activations[f"blocks.{options.layer}.attention.pattern"][0, options.head]
            inspection.draw_attention(pattern, texts, options.attention, f"layer {options.layer}, head {options.head}")
    following = [
        {"id": token, "text": inspection.text_of(tokenizer, token, prompt[-1]), "logit": logit, "probability": probability}
        for token, logit, probability in inspection.likeliest(logits[0, -1], options.top)
    ]
    tokens = [{"id": token, "text": text} for token, text in zip(prompt, texts)]
    if options.json:
        print(json.dumps({"tokens": tokens, "next": following, "greedy": following[0]}))
    else:
        print_prediction(tokens, following, model.config.vocab_size)


def print_prediction(tokens: list[dict], following: list[dict], vocab_size: int) -> None:
    """The tokens of a prompt, and a table of those that may follow."""
    print(f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} with their ids:")
    line = ""
    for token in tokens:
        item = f"  {token['text']!r} {token['id']}"
        if line and len(line + item) > 98:
            print(f"  {line}")
            line = ""
        line += item
    print(f"  {line}\n\nNext, by the logits after {tokens[-1]['text']!r}:\n")
    print("    rank      id    logit  probability  token")
    for rank, row in enumerate(following, 1):
        print(f"    {rank:>4}  {row['id']:>6}  {row['logit']:>7.3f}  {row['probability']:>11.3%}  {row['text']!r}")
    if len(following) < vocab_size:
        rest = max(0.0, 1 - sum(row["probability"] for row in following))
        print(f"    {'':>4}  {'':>6}  {'':>7}  {rest:>11.3%}  the other {vocab_size - len(following):,}")
    print(f"\nGreedy decoding takes {following[0]['text']!r} (id {following[0]['id']}).")


def run_train(options) -> None:
    device = device_of(own_device(options.device))
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(options, field.name) is not None
    }
    with joined(options.parallel, device) as processes, claimed(options.out, processes):
        if not options.resume:
            require_new_run(options.out)
            processes.any(False)  # all have looked before one writes
        place = {"device": device, "accumulate": options.accumulate, "processes": processes}
        trainer = resumed(options, given, place) if options.resume else started(options, given, place)
        if processes.first:
            parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            several = f" in each of {processes.size} processes ({processes.parallel})" if processes.parallel else ""
            if options.resume and trainer.step == trainer.config.steps:
                report(f"fastgpt: the run in {options.out} has done all its {trainer.step:,} steps: --steps MORE continues it")
            print(
                f"{parameters / 1e6:.2f} M parameters; {len(trainer.train_tokens):,} tokens to train on, "
                f"{len(trainer.held_out):,} held out; {trainer.config.steps - trainer.step} steps to go on {device}{several}"
            )
        try:
            train(trainer, options.out)
        except FloatingPointError as error:  # in all processes at once
            if processes.first:
                report(f"fastgpt: error: {error}")
            sys.exit(1)


def started(options, given: dict, place: dict) -> Trainer:
    if options.init_from is None:
        return Trainer(options.text, TrainConfig(**given), **place)
    config, model, tokenizer = pretrained(options.init_from, **given)
    trainer = Trainer(options.text, config, model=model, tokenizer=tokenizer, **place)
    if place["processes"].first:  # what else belongs to the tokenizer
        options.out.mkdir(parents=True, exist_ok=True)
        folder = hub.resolve(options.init_from)
        for name in (path.relative_to(folder) for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            if (file := folders.find(folder, name, "init-from")) is not None:
                (options.out / name).parent.mkdir(exist_ok=True)
                with folders.replacing(options.out / name) as copy:
                    shutil.copyfile(file, copy)
    return trainer


def resumed(options, given: dict, place: dict) -> Trainer:
    if options.init_from is not None:
        raise ValueError(f"init_from: expected none with --resume, which goes on from {options.out}, got {options.init_from}")
    return Trainer.resume(options.out, options.text, **place, **given)


def run_bench(options) -> None:
    require_number("seconds", options.seconds, least=0)
    device_limits = suite.DeviceLimits(device_of(options.device))
    cases = [case for case in suite.cases(device_limits, SHIPPED_MODEL) if options.only in f"{case.section}, {case.name}"]
    if not cases:
        raise ValueError(f"only: expected a part of what can be measured, {options.only!r} is in no name")
    torch.manual_seed(0)
    results = []
    try:
        with tqdm(cases, unit="case", leave=False, disable=sys.stderr is None or None) as bar:
            for case in bar:
                bar.set_description(case.name)
                results.append(suite.measure(case, device_limits, options.seconds / len(cases)))
    finally:  # on Ctrl-C, what there is so far
        machine = suite.machine(device_limits)
        if options.json:
            print(json.dumps({"machine": machine, "cases": results}))
        elif results:
            print(suite.table(machine, results))
    if any("problem" in result for result in results):
        sys.exit(1)


def run_info(options) -> None:
    build = fastgpt.build_info()
    triton = installed_version("triton")
    cuda = "CUDA " + torch.version.cuda if torch.version.cuda else "a CPU build"
    print(f"fastgpt {fastgpt.__version__}: {Path(fastgpt.__file__).parent}")
    print(f"Python {platform.python_version()}, torch {torch.__version__} ({cuda}), triton {triton or 'not installed'}")
    print(f"compiled by {build['compiler']} for torch >= {build['torch_target_version']}")
    print(f"CPU: {build['cpu_level']} in use, compiled: {', '.join(build['cpu_levels'])}; {torch.get_num_threads()} threads")
    archs = ", ".join(build["cuda_archs"])
    library = "not built (no working nvcc was found, or it was left out)"
    if archs:
        library = f"built for {archs} by CUDA {build['cuda_version']}"
    print(f"CUDA library: {library}" + (f"; not loaded: {CUDA_MISSING}" if archs and CUDA_MISSING else ""))
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    names = set()
    for device in devices:
        for operation, arguments in example_calls(device).items():
            reasons = fastgpt.explain(operation, *arguments)
            chosen = implementation(reasons)
            print(f"\n{operation.__qualname__} on {device}: {chosen}\n    {OPERATIONS[operation]}")
            for name, reason in reasons.items():
                if name != chosen:
                    print(f"    not {name}: {f'{chosen} comes first' if reason == 'available' else reason}")
            names |= reasons.keys()
    print()
    for name, meaning in IMPLEMENTATIONS.items():
        if name in names:
            print(f"{name}: {meaning}")


OPERATIONS = {  # what can be explained, in words
    fastgpt.attention: "softmax attention over keys and values, with its gradients",
    fastgpt.attention_varlen: "attention of sequences of different lengths, packed without padding",
    fastgpt.attention_with_kv_cache: "rotary embedding, storing into a cache, and attention over that cache",
    fastgpt.kv_cache_update: "storing keys and values into a cache",
    fastgpt.rope_kv_cache_update: "rotary embedding of queries and keys, and storing keys and values into a cache",
    fastgpt.linear: "product with a weight, with norm, activation, gate and residual; here of one row",
    fastgpt.norm: "layer norm or RMS norm, with the residual added",
    fastgpt.scaled_dot_product_attention: "attention as PyTorch's function of this name defines it",
    decoding: "a decoder's whole step from a token to the next logits",
}
IMPLEMENTATIONS = {
    "cpp": "a compiled C++ kernel, for CPUs",
    "cuda": "a compiled CUDA C++ kernel",
    "triton": "a Triton kernel, compiled for the GPU at its first use",
    "reference": "plain PyTorch, on every device",
    "unfused": "rope_kv_cache_update, then attention, each by the implementation that serves it",
    "torch": "PyTorch's own function",
    "cuda_graph": "captured in a CUDA graph once, and launched as a whole at every step",
    "cpu_replay": "its operations are recorded once, and called without Python at every step",
    "eager": "the model's modules are called from Python at every step",
}


def example_calls(device: torch.device) -> dict[Callable, tuple]:
    """Operation -> arguments as in generation, of what can be explained."""
    x = torch.zeros(1, 1, 1, 16, device=device)
    tiny = GPT(GPTConfig(vocab_size=16, context_length=16, num_layers=1, num_heads=1, hidden_size=16)).to(device)
    positions, ends = (torch.tensor(row, dtype=torch.int32, device=device) for row in ([[0]], [0, 1]))
    angles = x[0, 0, :, :8]
    return {
        fastgpt.attention: (x, x, x),
        fastgpt.attention_varlen: (x[0], x[0], x[0], ends, ends, 1, 1),
        fastgpt.attention_with_kv_cache: (x, x, x, x, x, positions),
        fastgpt.kv_cache_update: (x, x, x, x, positions),
        fastgpt.rope_kv_cache_update: (x, x, x, x, x, positions, angles, angles),
        fastgpt.linear: (x, x[0, 0]),
        fastgpt.norm: (x, x[0, 0, 0]),
        fastgpt.scaled_dot_product_attention: (x, x, x),
        decoding: (tiny, tiny.new_cache(1)),
    }


def device_of(name: str) -> torch.device:
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


def installed_version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
