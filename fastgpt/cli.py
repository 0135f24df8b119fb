"""The command line: fastgpt generate | train | bench | info."""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fastgpt
from fastgpt import bench
from fastgpt.cache import CACHE_KINDS
from fastgpt.checkpoint import TOKENIZER
from fastgpt.distributed import PARALLEL, joined, own_device
from fastgpt.generate import stream
from fastgpt.model import GPT
from fastgpt.text import Tokenizer
from fastgpt.train import STATE, TrainConfig, Trainer, pretrained, train
from fastgpt.train import DTYPES as TRAIN_DTYPES

SHIPPED_MODEL = Path(__file__).parent / "assets" / "shakespeare-char"
DEFAULT_PROMPT = "\n"  # where the shipped model's text begins a new speech
CACHE_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 2 and one line on bad input, 130 on Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the exit's flush complain
    except (ValueError, TypeError, OSError) as error:
        print(f"fastgpt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nfastgpt: interrupted", file=sys.stderr)
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastgpt", description=fastgpt.__doc__)
    top.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="continue a prompt", formatter_class=Formatter)
    command.set_defaults(run=run_generate)
    add = command.add_argument
    add("prompt", nargs="?", default=DEFAULT_PROMPT, metavar="PROMPT", help="the text to continue")
    add("--model", type=Path, default=SHIPPED_MODEL, metavar="DIR", help="checkpoint folder (the shipped model)")
    add("--max-new-tokens", type=int, default=300, metavar="N", help="tokens to generate")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, metavar="D", help=f"of weights: {', '.join(DTYPES)} (as stored)")
    add("--cache", choices=CACHE_KINDS, default="contiguous", metavar="KIND", help=f"{', '.join(CACHE_KINDS)}")
    add("--cache-dtype", choices=CACHE_DTYPES, metavar="D", help=f"{', '.join(CACHE_DTYPES)} (that of the weights)")
    add("--window", type=int, metavar="N", help="attend to the last N tokens only; a sliding cache keeps only these")
    add("--no-cache", action="store_true", help="recompute everything at every step")
    add("--compare-cache", action="store_true", help="generate with and without the cache, compare tokens and speed")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")

    command = commands.add_parser("train", help="train a model on a text file", formatter_class=Formatter)
    command.set_defaults(run=run_train)
    add = command.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="the text; its last 10%% is held out")
    add("--out", type=Path, required=True, metavar="DIR", help="where checkpoints go")
    add("--resume", action="store_true", help="continue the run in DIR, with its settings")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--init-from", type=Path, metavar="DIR", help="go on from the model and tokenizer of a checkpoint folder")
    add("--parallel", choices=PARALLEL, help="started by torchrun, each process has the whole model or a part (ddp)")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a process's share of a batch in N parts (1)")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        metavar = {int: "N", float: "X", str: "D"}[field.type]
        choices = TRAIN_DTYPES if field.name == "dtype" else None
        add(flag, type=field.type, choices=choices, metavar=metavar, help=f"(default {field.default})")

    command = commands.add_parser("bench", help="how fast this machine is, in two minutes", formatter_class=Formatter)
    command.set_defaults(run=run_bench)
    add = command.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--only", default="", metavar="TEXT", help="what has TEXT in its name: GPT-2, attention, one token, ...")
    add("--seconds", type=float, default=90.0, metavar="S", help="to measure for; seven rounds of each at least (90)")
    add("--json", action="store_true", help="print one JSON object instead of the table")

    command = commands.add_parser("info", help="versions, device, and which implementation serves each operation")
    command.set_defaults(run=run_info)
    return top


class Formatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


def run_generate(options) -> None:
    device = device_of(options.device)
    model = GPT.from_pretrained(options.model, dtype=DTYPES.get(options.dtype), device=device)
    tokenizer = Tokenizer.load(options.model / TOKENIZER)
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("prompt: expected at least one character, got an empty prompt")
    ids = torch.tensor([prompt], device=device)

    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "big")  # one for both ways of --compare-cache

    quiet = options.json
    result = timed_generation(model, tokenizer, ids, options, use_cache=not options.no_cache, quiet=quiet)
    report = {
        "text": result.text,
        "prompt_tokens": len(prompt),
        "new_tokens": len(result.tokens),
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "decode_tokens_per_second": result.tokens_per_second,
        "device": str(device),
        "dtype": str(model.token_embedding.weight.dtype).removeprefix("torch."),
        "implementation": serving(device)["attention"][0],
    }
    if options.compare_cache:
        other = timed_generation(model, tokenizer, ids, options, use_cache=options.no_cache, quiet=True)
        cached, uncached = (other, result) if options.no_cache else (result, other)
        agree = cached.tokens == uncached.tokens
        report["decode_tokens_per_second"] = cached.tokens_per_second
        report["uncached_tokens_per_second"] = uncached.tokens_per_second
        report["speed_up"] = ratio(cached.tokens_per_second, uncached.tokens_per_second)
        report["tokens_agree"] = agree
    if options.json:
        print(json.dumps(report))
    elif options.compare_cache:
        print(f"\ncached: {shown(report['decode_tokens_per_second'])} tok/s")
        print(f"uncached: {shown(report['uncached_tokens_per_second'])} tok/s")
        print(f"speed-up: {shown(report['speed_up'])}x")
        rounded = "" if agree or options.cache_dtype is None else f", which is rounded to {options.cache_dtype}"
        print(f"tokens: {'the same' if agree else 'NOT the same'} with and without the cache{rounded}")
    if options.compare_cache and not agree and options.cache_dtype is None:  # rounded to 8 bits, they may differ
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Generation:
    tokens: list[int]  # the new ones
    text: str  # prompt and continuation
    prefill_seconds: float  # until the first new token
    decode_seconds: float  # for the others

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None where one token is all there was to decode."""
        return ratio(len(self.tokens) - 1, self.decode_seconds) if len(self.tokens) > 1 else None


def timed_generation(model, tokenizer, ids, options, *, use_cache, quiet) -> Generation:
    """Generates from ids (1, T), timed; unless quiet, text is printed as it comes."""
    stream_of_tokens = stream(
        model,
        ids,
        options.max_new_tokens,
        use_cache=use_cache,
        cache=options.cache,
        cache_dtype=CACHE_DTYPES.get(options.cache_dtype),
        window=options.window,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    new, times = [], [time.perf_counter()]

    def tokens():
        yield from ids[0].tolist()
        for token in stream_of_tokens:
            new.append(token.item())  # waits for the device
            times.append(time.perf_counter())
            yield new[-1]

    text = ""
    for piece in tokenizer.decode_stream(tokens()):
        text += piece
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print()
    return Generation(new, text, times[min(1, len(new))] - times[0], times[-1] - times[min(1, len(new))])


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def shown(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}"


def run_train(options) -> None:
    if not options.text.is_file():
        raise FileNotFoundError(f"text: expected a file, {options.text} does not exist or is not a file")
    text = options.text.read_text(encoding="utf-8")
    device = device_of(own_device(options.device))
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(options, field.name) is not None
    }
    with joined(options.parallel, device) as processes:
        place = {"device": device, "accumulate": options.accumulate, "processes": processes}
        trainer = resumed(options, text, given, place) if options.resume else started(options, text, given, place)
        if processes.first:
            parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            several = f" in each of {processes.size} processes ({processes.parallel})" if processes.parallel else ""
            print(
                f"{parameters / 1e6:.2f} M parameters; {len(trainer.train_tokens):,} tokens to train on, "
                f"{len(trainer.held_out):,} held out; {trainer.config.steps - trainer.step} steps to go on {device}{several}"
            )
        train(trainer, options.out)


def started(options, text: str, given: dict, place: dict) -> Trainer:
    if (options.out / STATE).exists():
        raise ValueError(f"out: expected a new folder, {options.out} holds a run; continue it with --resume")
    if options.init_from is None:
        return Trainer(text, TrainConfig(**given), **place)
    config, model, tokenizer = pretrained(options.init_from, **given)
    return Trainer(text, config, model=model, tokenizer=tokenizer, **place)


def resumed(options, text: str, given: dict, place: dict) -> Trainer:
    if options.init_from is not None:
        raise ValueError(f"init_from: expected none with --resume, which goes on from {options.out}, got {options.init_from}")
    trainer = Trainer.resume(options.out, text, **place)
    for name, value in given.items():
        if value != getattr(trainer.config, name):
            raise ValueError(
                f"{name}: expected {getattr(trainer.config, name)}, with which the run in {options.out} was "
                f"started, got {value}"
            )
    return trainer


def run_bench(options) -> None:
    place = bench.Place(device_of(options.device))
    cases = [case for case in bench.cases(place, SHIPPED_MODEL) if options.only in f"{case.section}, {case.name}"]
    if not cases:
        raise ValueError(f"only: expected a part of what can be measured, {options.only!r} is in no name")
    torch.manual_seed(0)
    results = []
    try:
        with tqdm(cases, unit="case", leave=False, disable=None) as bar:
            for case in bar:
                bar.set_description(case.name)
                results.append(bench.measure(case, place, options.seconds / len(cases)))
    finally:  # on Ctrl-C, what there is so far
        machine = bench.machine(place)
        if options.json:
            print(json.dumps({"machine": machine, "cases": results}))
        elif results:
            print(bench.table(machine, results))
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
    print(f"CUDA library: {f'built for {archs}' if archs else 'not built (no working nvcc was found, or it was left out)'}")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    for device in devices:
        for operation, (chosen, others) in serving(device).items():
            print(f"\n{operation} on {device}: {chosen}")
            for name, reason in others.items():
                print(f"    not {name}: {reason}")


def serving(device: torch.device) -> dict[str, tuple[str, dict[str, str]]]:
    """Operation -> (the implementation that serves generation on this device, the others with why not)."""
    x = torch.zeros(1, 1, 1, 16, device=device)
    positions = torch.zeros(1, 1, dtype=torch.int32, device=device)
    calls = {
        "attention": fastgpt.explain(fastgpt.attention, x, x, x),
        "kv_cache_update": fastgpt.explain(fastgpt.kv_cache_update, x, x, x, x, positions),
        "rope_kv_cache_update": fastgpt.explain(
            fastgpt.rope_kv_cache_update, x, x, x, x, x, positions, x[0, 0, :, :8], x[0, 0, :, :8]
        ),
        "linear": fastgpt.explain(fastgpt.linear, x, x[0, 0]),
    }
    result = {}
    for operation, reasons in calls.items():
        chosen = next(name for name, reason in reasons.items() if reason == "chosen")
        others = {
            name: f"{chosen} comes first" if reason == "available" else reason
            for name, reason in reasons.items()
            if name != chosen
        }
        result[operation] = chosen, others
    return result


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
