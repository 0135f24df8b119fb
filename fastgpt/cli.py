"""The command line: fastgpt generate | inspect | train | bench | info."""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import fastgpt
from fastgpt import bench, checkpoint, inspection
from fastgpt.cache import CACHE_KINDS
from fastgpt.context import require_causal
from fastgpt.distributed import PARALLEL, joined, own_device
from fastgpt.model import GPT
from fastgpt.pipelines import Pipeline, Run, as_messages, pipeline
from fastgpt.text import Tokenizer
from fastgpt.train import TrainConfig, Trainer, pretrained, require_new_run, require_writable, train
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
    add("--model", default=SHIPPED_MODEL, metavar="PATH", help="checkpoint folder or its id on the hub (the shipped model)")
    add("--chat", action="store_true", help="PROMPT is a user's message, to be answered; only the answer is printed")
    add("--template-var", action="append", default=[], metavar="NAME=VALUE", help="with --chat: a variable of the chat "
        "template, enable_thinking=false say; VALUE is JSON, or else a text; may be given several times")
    add("--max-new-tokens", type=int, default=300, metavar="N", help="tokens to generate (300)")
    add("--num-samples", type=int, default=1, metavar="N", help="so many texts, printed when all are ready")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be given several times")
    add("--ignore-eos", action="store_true", help="go on after tokens that end a text")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    add("--min-p", type=float, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="> 1 makes tokens less likely that there were")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, metavar="D", help=f"of weights: {', '.join(DTYPES)} (as stored)")
    add("--cache", choices=CACHE_KINDS, default="contiguous", metavar="KIND", help=f"{', '.join(CACHE_KINDS)}")
    add("--cache-dtype", choices=CACHE_DTYPES, metavar="D", help=f"{', '.join(CACHE_DTYPES)} (that of the weights)")
    add("--window", type=int, metavar="N", help="attend to the last N tokens only; a sliding cache keeps only these")
    add("--no-cache", action="store_true", help="recompute everything at every step")
    add("--compare-cache", action="store_true", help="generate with and without the cache, compare tokens and speed")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")
    add("--logprobs", action="store_true", help="with --json: each token and its log-probability")

    command = commands.add_parser("inspect", help="what a model sees in a prompt", formatter_class=Formatter)
    command.set_defaults(run=run_inspect)
    add = command.add_argument
    add("prompt", metavar="PROMPT", help="the text to look at")
    add("--model", default=SHIPPED_MODEL, metavar="DIR", help="checkpoint folder (the shipped model)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--top", type=int, default=10, metavar="N", help="how many next tokens to show")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    add("--attention", type=Path, metavar="FILE", help="save a picture of what attends to what: .png, .svg, .pdf, ...")
    add("--layer", type=int, default=0, metavar="L", help="of the picture; the first is 0")
    add("--head", type=int, default=0, metavar="H", help="of the picture; the first is 0")

    command = commands.add_parser("train", help="train a model on a text file", formatter_class=Formatter)
    command.set_defaults(run=run_train)
    add = command.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="the text, in UTF-8; its last 10%% is held out")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for checkpoints, or with --resume that of a run")
    add("--resume", action="store_true", help="continue the run in DIR with its settings; of these, all but layers, heads, "
        "width, context, dropout and eval-windows may be given anew")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="cpu, cuda, cuda:1, ...")
    add("--init-from", metavar="PATH_OR_ID", help="go on from a checkpoint: its model and its tokenizer")
    add("--parallel", choices=PARALLEL, help="under torchrun, each process has the whole model (ddp) or a part (fsdp) (ddp)")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a process's share of a batch in N parts, which takes "
        "less memory (1)")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        metavar = {int: "N", float: "X", str: "D"}[field.type]
        choices = TRAIN_DTYPES if field.name == "dtype" else None
        add(flag, type=field.type, choices=choices, metavar=metavar, help=f"{field.metadata['meaning']} ({field.default})")

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
    if options.logprobs and not options.json:
        raise ValueError("logprobs: expected --json with it, got --logprobs alone")
    if options.template_var and not options.chat:
        raise ValueError("template-var: expected --chat with it, got --template-var alone")
    device = device_of(own_device(options.device))
    with joined(None, device) as processes:  # one, unless torchrun started several
        pipe = pipeline(options.model, dtype=DTYPES.get(options.dtype), device=device)
        if processes.size > 1:
            from fastgpt.parallel import tensor_parallel  # slow to load

            tensor_parallel(pipe.model)
        if options.seed is None:  # one for both ways of --compare-cache, and for all processes
            options.seed = processes.agreed(int.from_bytes(os.urandom(4), "big"))
        if processes.first:
            generate_text(pipe, options, device)
        else:
            with contextlib.redirect_stdout(None):
                generate_text(pipe, options, device)


def generate_text(pipe: Pipeline, options, device: torch.device) -> None:
    run = run_generation(pipe, options, use_cache=not options.no_cache, quiet=options.json)
    report = texts(pipe, run, options) | {
        "prompt_tokens": len(run.prompts[0]),
        "new_tokens": sum(len(row.tokens) for row in run.rows),
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "decode_tokens_per_second": run.tokens_per_second,
        "seed": options.seed,
        "device": str(device),
        "dtype": str(pipe.model.token_embedding.weight.dtype).removeprefix("torch."),
        "implementation": serving(device)["attention"][0],
    }
    if options.compare_cache:
        other = run_generation(pipe, options, use_cache=options.no_cache, quiet=True)
        cached, uncached = (other, run) if options.no_cache else (run, other)
        agree = [row.tokens for row in cached.rows] == [row.tokens for row in uncached.rows]
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


def run_generation(pipe: Pipeline, options, *, use_cache: bool, quiet: bool) -> Run:
    """Generates as the options say; unless quiet, prints prompt and text, as it comes if there is one sample only."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "num_samples", "cache", "window", "stop")
    given = {name: getattr(options, name) for name in names} | ({"eos": None} if options.ignore_eos else {})
    if options.template_var:
        given["template_variables"] = dict(map(template_variable, options.template_var))
    run = pipe.start(
        [as_messages(options.prompt) if options.chat else options.prompt], options.max_new_tokens,
        use_cache=use_cache, cache_dtype=CACHE_DTYPES.get(options.cache_dtype), return_logprobs=options.logprobs, **given,
    )  # fmt: skip
    before = "" if options.chat else options.prompt
    streams = options.num_samples == 1 and not quiet
    if streams:
        print(before, end="", flush=True)
    for pieces in run:
        if streams:
            print(pieces[0], end="", flush=True)
    if streams:
        print()
    elif not quiet:
        texts = [f"--- {number} of {len(run.rows)}\n{before}{row.text}\n" for number, row in enumerate(run.rows, 1)]
        print("\n".join(texts), end="")
    return run


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
    """What was generated, for --json: of the one sample, or a list in `samples`."""
    result = []
    for row in run.rows:
        result.append({"text": ("" if options.chat else options.prompt) + row.text, "finish_reason": row.finish_reason})
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
    folder = checkpoint.resolve(options.model)
    model = GPT.from_pretrained(folder, device=device_of(options.device))
    require_causal(model.config)
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("prompt: expected at least one character, got an empty prompt")
    texts = [inspection.text_of(tokenizer, *pair) for pair in zip(prompt, [None, *prompt])]
    ids = torch.tensor([prompt], device=model.token_embedding.weight.device)
    with torch.no_grad():
        if options.attention is None:
            logits = model.logits(model.hidden(ids, last_only=True))
        else:
            for name, count in (("layer", model.config.num_layers), ("head", model.config.num_heads)):
                if not 0 <= getattr(options, name) < count:
                    raise ValueError(f"{name}: expected a number from 0 to {count - 1}, got {getattr(options, name)}")
            logits, activations = model.run_with_cache(ids)
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
    with joined(options.parallel, device) as processes:
        if not options.resume:
            require_new_run(options.out)
            processes.any(False)  # all have looked before one writes
        require_writable(options.out)
        place = {"device": device, "accumulate": options.accumulate, "processes": processes}
        trainer = resumed(options, given, place) if options.resume else started(options, given, place)
        if processes.first:
            parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            several = f" in each of {processes.size} processes ({processes.parallel})" if processes.parallel else ""
            print(
                f"{parameters / 1e6:.2f} M parameters; {len(trainer.train_tokens):,} tokens to train on, "
                f"{len(trainer.held_out):,} held out; {trainer.config.steps - trainer.step} steps to go on {device}{several}"
            )
        try:
            train(trainer, options.out)
        except FloatingPointError as error:  # in all processes at once
            if processes.first:
                print(f"fastgpt: error: {error}", file=sys.stderr)
            sys.exit(1)


def started(options, given: dict, place: dict) -> Trainer:
    if options.init_from is None:
        return Trainer(options.text, TrainConfig(**given), **place)
    config, model, tokenizer = pretrained(options.init_from, **given)
    trainer = Trainer(options.text, config, model=model, tokenizer=tokenizer, **place)
    if place["processes"].first:  # what else belongs to the tokenizer
        for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
            file = checkpoint.resolve(options.init_from) / name
            if file.is_file():
                shutil.copyfile(file, options.out / name)
    return trainer


def resumed(options, given: dict, place: dict) -> Trainer:
    if options.init_from is not None:
        raise ValueError(f"init_from: expected none with --resume, which goes on from {options.out}, got {options.init_from}")
    return Trainer.resume(options.out, options.text, **place, **given)


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
        "attention_with_kv_cache": fastgpt.explain(fastgpt.attention_with_kv_cache, x, x, x, x, x, positions),
        "kv_cache_update": fastgpt.explain(fastgpt.kv_cache_update, x, x, x, x, positions),
        "rope_kv_cache_update": fastgpt.explain(
            fastgpt.rope_kv_cache_update, x, x, x, x, x, positions, x[0, 0, :, :8], x[0, 0, :, :8]
        ),
        "linear": fastgpt.explain(fastgpt.linear, x, x[0, 0]),
        "norm": fastgpt.explain(fastgpt.norm, x, x[0, 0, 0]),
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
