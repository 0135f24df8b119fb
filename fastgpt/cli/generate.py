"""`fastgpt generate`: continues prompts, as a stream of text or as JSON, and compares generation with and without a cache."""

import argparse
import contextlib
import json
import os
import sys

import torch

import fastgpt
from fastgpt.bench.timing import implementation
from fastgpt.cache.create import CACHE_KINDS
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
    path_or_id,
    require_read,
    template_variables,
    unescape,
)
from fastgpt.cli.arguments import speculation as speculation_of
from fastgpt.cli.draft import draft_model
from fastgpt.cli.example_calls import example_calls
from fastgpt.cli.output import print_stderr
from fastgpt.cli.prompts import default_prompt, read_prompts
from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation.config import MAX_NEW_TOKENS, GenerationConfig
from fastgpt.generation.many import Interrupted
from fastgpt.generation.pipeline import ManyRun, Pipeline, Run, as_messages, pipeline
from fastgpt.training.processes import joined, local_device

DESCRIPTION = """\
Continues a prompt and prints both, the text as it is generated; of an encoder-decoder, such as T5, the text that it writes
for the prompt. Options that are not given are those of the
checkpoint's generation_config.json, or else the defaults in parentheses."""
EXAMPLES = """\
examples:
  fastgpt generate "ROMEO:" --temperature 0.8 --seed 1
  fastgpt generate "Who are you?" --model PATH_OR_ID --chat
  git diff | fastgpt generate --model PATH_OR_ID --stop "\\n\\n"
  fastgpt generate --prompt-file story.txt --json --logprobs
  fastgpt generate --prompts questions.txt --max-batch 32 --json"""
# Options of `fastgpt.generate` that the command has by the same names.
SAME_NAMES = (*SAMPLING, "min_new_tokens", "num_samples", "cache", "window", "max_batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.description, parser.epilog = "%(prog)s [options] [PROMPT ...]", DESCRIPTION, EXAMPLES
    add = parser.add_argument_group("text").add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="text to continue, one or several; - reads standard input, which is also "
        "read if there is no PROMPT and something is piped in (a line break)")  # fmt: skip
    add("--prompt-file", type=path_or_id, action="append", default=[], metavar="FILE", help="read a prompt from FILE, in "
        "UTF-8; can be repeated. A line break at its end is removed, as from standard input")  # fmt: skip
    add("--prompts", type=path_or_id, metavar="FILE", help="read prompts from FILE, in UTF-8, one on each line; empty lines are "
        "left out")  # fmt: skip
    add("--max-batch", type=integer, metavar="N", help="generate at most N texts at once; others wait and join as texts end (of "
        "up to 64, all; of more, as many as memory and speed suggest)")  # fmt: skip
    add("--chat", action="store_true", help="PROMPT is a user's message: apply the chat template, and print only the answer")
    add_template_variables(add, "with --chat: ")
    add("--max-new-tokens", type=integer, metavar="N", help=f"tokens to generate ({MAX_NEW_TOKENS}, or as many as the "
        "context has room for)")  # fmt: skip
    add("--min-new-tokens", type=integer, metavar="N", help="do not end a text before it has N new tokens (0)")
    add_stop(add)
    add("--ignore-eos", action="store_true", help="do not stop at end-of-sequence tokens")
    add("--num-samples", type=integer, metavar="N", help="samples of each prompt, printed when all are complete (1)")

    add_sampling(parser, "of the samples (a random one, printed at the end)")

    add = parser.add_argument_group("model and device").add_argument
    add_loading(add)
    add("--cache", choices=CACHE_KINDS, metavar="KIND", help=f"kind of KV cache: {', '.join(CACHE_KINDS)} (contiguous)")
    add_cache_dtype(add)
    add("--window", type=integer, metavar="N", help="attend to the last N tokens only; a sliding cache keeps only these (all)")
    add("--no-cache", action="store_true", help="recompute the keys and values of all tokens at every step")

    add_speculation(parser)

    add = parser.add_argument_group("output").add_argument
    add("--compare-cache", action="store_true", help="generate with and without the cache, compare tokens and speed")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")
    add("--logprobs", action="store_true", help="with --json: each token and its log-probability")


def run(options: argparse.Namespace) -> None:
    require_consistent(options)
    settings = generation_settings(options)
    prompts = read_prompts(options.prompt, options.prompt_file, options.prompts)
    device = device_of(local_device(options.device))
    with joined(None, device) as processes:  # one, unless torchrun started several
        pipe = pipeline(
            options.model,
            revision=options.revision,
            dtype=DTYPES.get(options.dtype),
            device=device,
            weights=options.weights,
            lora=options.lora,
        )
        if processes.size > 1:
            from fastgpt.parallel import tensor_parallel  # slow to load

            tensor_parallel(pipe.model)
        if options.draft is not None:
            settings["speculate"] = draft_model(options, pipe.model, device)
        if not prompts and isinstance(pipe.model, fastgpt.EncoderDecoder):
            raise ValueError("prompt: expected a text for an encoder-decoder to read, got none")
        prompts = prompts or [default_prompt(pipe.tokenizer)]
        if options.seed is None:  # one for both ways of --compare-cache, and for all processes
            settings["seed"] = processes.broadcast(int.from_bytes(os.urandom(4), "big"))
        if processes.first:
            generate_text(pipe, prompts, settings, options, device)
        else:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
                generate_text(pipe, prompts, settings, options, device)


def require_consistent(options: argparse.Namespace) -> None:
    """Raises ValueError for options that have no effect without others, or contradict them."""
    if options.logprobs and not options.json:
        raise ValueError("logprobs: expected --json with it, got --logprobs alone")
    if options.template_var and not options.chat:
        raise ValueError("template-var: expected --chat with it, got --template-var alone")
    if options.max_batch is not None and (options.no_cache or options.compare_cache):
        raise ValueError(f"max_batch: expected none with --no-cache or --compare-cache, got {options.max_batch}")
    if options.no_cache and not options.compare_cache:
        for name in ("cache", "cache_dtype", "draft"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: expected none with --no-cache, got {getattr(options, name)}")
        if options.speculate:
            raise ValueError("speculate: expected a cache with it, got --no-cache")


def generation_settings(options: argparse.Namespace) -> dict:
    """The arguments of `Pipeline.start`, checked before anything is loaded; the checkpoint has the defaults of the others."""
    settings = {name: getattr(options, name) for name in SAME_NAMES if getattr(options, name) is not None}
    if options.cache_dtype is not None:
        settings["cache_dtype"] = CACHE_DTYPES[options.cache_dtype]
    settings["return_logprobs"] = options.logprobs
    settings |= speculation_of(options)
    GenerationConfig(**settings)
    require_integer("max_new_tokens", options.max_new_tokens, least=0, optional=True)
    settings["stop"] = [unescape(text, "stop") for text in options.stop]
    if options.template_var:
        settings["template_variables"] = template_variables(options)
    return settings | ({"eos": None} if options.ignore_eos else {})


def generate_text(
    pipe: Pipeline, prompts: list[str], settings: dict, options: argparse.Namespace, device: torch.device
) -> None:
    """Generates and prints text and measurements; exits with status 1 if --compare-cache finds different tokens."""
    if options.chat and pipe.tokenizer.chat_template is None:
        which = "the shipped model" if options.model == SHIPPED_MODEL else options.model
        raise ValueError(f"chat: expected a --model with a chat template, {which} has none")
    require_read(settings.get("template_variables", {}), pipe.tokenizer)
    generation = generate_once(pipe, prompts, settings, options, use_cache=not options.no_cache, quiet=options.json)
    print_warnings(generation, options, pipe.model.config.context_length)
    result = texts(pipe, generation, prompts, options) | measurements(pipe, generation, device)
    done = sum(row.finish_reason is not None for row in generation.rows)
    if options.compare_cache and done == len(generation.rows):
        other = generate_once(pipe, prompts, settings, options, use_cache=options.no_cache, quiet=True)
        result |= comparison(other, generation) if options.no_cache else comparison(generation, other)
    if options.json:
        print(json.dumps(result))
    elif "tokens_agree" in result:
        print_comparison(result, options.cache_dtype)
    else:
        print_speed(result)
    if done < len(generation.rows):
        print_stderr(f"fastgpt: interrupted: {done} of {len(generation.rows)} texts are done")
        sys.exit(130)
    if options.compare_cache and not result["tokens_agree"] and options.cache_dtype is None:  # of 8 bits, they may differ
        sys.exit(1)


def generate_once(
    pipe: Pipeline, prompts: list[str], settings: dict, options: argparse.Namespace, *, use_cache: bool, quiet: bool
) -> Run | ManyRun:
    """Generates; unless quiet, prints prompts and texts, a single text as it is generated. Of many texts, Ctrl-C keeps those that
    are done."""
    if not use_cache:
        settings = {name: value for name, value in settings.items() if not name.startswith("speculate")}
    given = [as_messages(prompt) if options.chat else prompt for prompt in prompts]
    generation = pipe.start(given, options.max_new_tokens, use_cache=use_cache, **settings)
    printed = printed_prompts(generation, prompts, options)
    if isinstance(generation, ManyRun):
        with contextlib.suppress(Interrupted):
            generation.finish(progress=is_terminal(sys.stderr))
        if not quiet:
            print_texts(generation, prompts, printed)
        return generation
    streams = len(printed) == 1 and not quiet
    if streams:
        print(printed[0], end="", flush=True)
    for pieces in generation:
        if streams:
            print(pieces[0], end="", flush=True)
    if streams:
        print()
    elif not quiet:
        print_texts(generation, prompts, printed)
    return generation


def print_texts(generation: Run | ManyRun, prompts: list[str], printed: list[str]) -> None:
    """Prints each text that is done under a heading."""
    headings = [shortened(prompt) for prompt in prompts for _ in range(generation.options.num_samples)]
    texts = enumerate(zip(headings, printed, generation.rows), 1)
    lines = [
        f"--- {number} of {len(printed)}: {heading}\n{prompt}{row.text}\n"
        for number, (heading, prompt, row) in texts
        if row.finish_reason is not None
    ]
    print("\n".join(lines), end="")


def shortened(prompt: str) -> str:
    """The beginning of a prompt, in one line."""
    return repr(prompt if len(prompt) <= 40 else prompt[:39] + "…")


def printed_prompts(generation: Run | ManyRun, prompts: list[str], options: argparse.Namespace) -> list[str]:
    """What is printed before each text: its prompt, or nothing for a chat, and what an encoder-decoder wrote."""
    return [
        prompt if generation.continues and not options.chat else ""
        for prompt in prompts
        for _ in range(generation.options.num_samples)
    ]


def print_warnings(generation: Run | ManyRun, options: argparse.Namespace, context: int) -> None:
    given = {"--top-k": options.top_k, "--top-p": options.top_p, "--min-p": options.min_p}
    ignored = ", ".join(option for option, value in given.items() if value is not None)
    if ignored and generation.options.temperature == 0:
        print_stderr(f"fastgpt: without effect at temperature 0: {ignored}; choose a --temperature above it")
    if generation.options.num_samples > 1 and generation.options.temperature == 0:
        print_stderr("fastgpt: the samples of a prompt are all the same at temperature 0: choose a --temperature above it")
    longest = max(map(len, generation.prompts))
    if options.max_new_tokens is None and longest == context and generation.continues:
        print_stderr(f"fastgpt: a prompt of {longest:,} tokens fills the model's context: there is no room for new ones")


def texts(pipe: Pipeline, generation: Run | ManyRun, prompts: list[str], options: argparse.Namespace) -> dict:
    """The generated text for --json, or a list of texts in `samples`, those of the first prompt first."""
    result: list[dict] = []
    for prompt, row in zip(printed_prompts(generation, prompts, options), generation.rows):
        result.append({"text": prompt + row.text, "finish_reason": row.finish_reason})
        if options.logprobs:
            names = map(pipe.tokenizer.backend.id_to_token, row.tokens)
            entries = zip(row.tokens, names, row.logprobs)
            result[-1]["tokens"] = [{"id": token, "token": name, "logprob": logprob} for token, name, logprob in entries]
    return result[0] if len(result) == 1 else {"samples": result}


def measurements(pipe: Pipeline, generation: Run | ManyRun, device: torch.device) -> dict:
    """Counts, times and settings of a generation, for --json."""
    reasons = fastgpt.explain(fastgpt.attention, *example_calls(device)[fastgpt.attention])
    return {
        "prompt_tokens": sum(map(len, generation.prompts)),
        "new_tokens": sum(len(row.tokens) for row in generation.rows),
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "decode_tokens_per_second": generation.tokens_per_second,
        "tokens_per_pass": generation.tokens_per_pass,
        "seed": generation.options.seed if generation.options.temperature > 0 else None,  # where something is sampled
        "device": str(device),
        "dtype": str(pipe.model.first_weight.dtype).removeprefix("torch."),
        "implementation": implementation(reasons),
    }


def comparison(cached: Run | ManyRun, uncached: Run | ManyRun) -> dict:
    speed, without = cached.tokens_per_second, uncached.tokens_per_second
    return {
        "decode_tokens_per_second": speed,
        "uncached_tokens_per_second": without,
        "speed_up": speed / without if speed is not None and without else None,
        "tokens_agree": [row.tokens for row in cached.rows] == [row.tokens for row in uncached.rows],
    }


def print_comparison(result: dict, cache_dtype: str | None) -> None:
    print(f"\ncached: {shown(result['decode_tokens_per_second'])} tok/s")
    print(f"uncached: {shown(result['uncached_tokens_per_second'])} tok/s")
    print(f"speed-up: {shown(result['speed_up'])}x")
    agree = result["tokens_agree"]
    rounded = "" if agree or cache_dtype is None else f", which is rounded to {cache_dtype}"
    print(f"tokens: {'the same' if agree else 'NOT the same'} with and without the cache{rounded}")


def print_speed(result: dict) -> None:
    tokens, speed, seed = result["new_tokens"], result["decode_tokens_per_second"], result["seed"]
    print(end="", flush=True)  # the text comes first where both go to one place; there may be no sys.stdout
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
    parts += [] if speed is None else [f"{shown(speed)} tok/s"]
    parts += [f"{result['tokens_per_pass']:.2f} tokens a pass"] if (result["tokens_per_pass"] or 1) != 1 else []
    print_stderr(", ".join(parts + ([] if seed is None else [f"seed {seed}"])))


def shown(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}"
