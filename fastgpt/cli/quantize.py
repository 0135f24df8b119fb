"""`fastgpt quantize`: a model with matrices of 8 or 4 bits, as a folder or a GGUF file."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgpt import folders
from fastgpt.checkpoints import gguf_file, gguf_tensors, gguf_writer, hub, quantized_folders, transformers_format
from fastgpt.checkpoints.files import TOKENIZER
from fastgpt.checks import is_terminal, require_integer, require_path, writing
from fastgpt.cli.arguments import integer, path, path_or_id
from fastgpt.cli.output import print_stderr
from fastgpt.folders import new_folder, replacing
from fastgpt.generation.pipeline import Pipeline, pipeline
from fastgpt.ops.quantized_weight import BITS, Quantization, QuantizedWeight
from fastgpt.text.gguf_tokenizer_writer import gguf_from_tokenizer
from fastgpt.text.tokenizer_files import copy_companions
from fastgpt.training.evaluation import evaluate

GROUPS = {"32": 32, "64": 64, "128": 128, "row": None}
GGUF_TYPES = {"q8_0": Quantization("int8"), "q4_0": Quantization("int4"), "q4_1": Quantization("int4", minima=True)}
WINDOW, OVERLAP = 1024, 512  # tokens of a window of the evaluation, and how many of them only the window before predicts
DESCRIPTION = """\
Quantizes the matrices of a model to 8 or 4 bits per weight, and writes it to OUT: a new folder, which fastgpt loads like any
other, with identical weights; or with --gguf a new GGUF file, which llama.cpp runs, too. With int4, the token embedding and
the output matrix take 8 bits."""
EVALUATED = 16384  # tokens, by default
EXAMPLES = """\
examples:
  fastgpt quantize PATH_OR_ID smaller --weights int4 --minima
  fastgpt quantize PATH_OR_ID model.gguf --gguf q4_1 --evaluate text.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.description, parser.epilog = "%(prog)s [options] MODEL OUT", DESCRIPTION, EXAMPLES
    add = parser.add_argument
    add("source", type=path_or_id, metavar="MODEL", help="checkpoint folder, GGUF file, or the id of a model on the Hugging Face "
        "Hub")  # fmt: skip
    add("target", type=path, metavar="OUT", help="where the quantized model goes: must not exist")
    add("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub (its main branch)")
    add("--weights", choices=BITS, metavar="D", help=f"{' or '.join(BITS)}; implied by --gguf")
    add("--group-size", choices=GROUPS, metavar="N", help=f"numbers that share a scale: {', '.join(GROUPS)} (32)")
    add("--minima", action="store_true", help="give each group a minimum besides its scale")
    add("--gguf", choices=GGUF_TYPES, metavar="TYPE", help=f"write a GGUF file in {', '.join(GGUF_TYPES)}")
    add("--evaluate", type=path, metavar="TEXT", help=f"print perplexities before and after on the text in this file, in windows "
        f"of {WINDOW} tokens (or the model's context) that overlap by half")  # fmt: skip
    add("--evaluate-tokens", type=integer, metavar="N", help=f"with --evaluate: the first N tokens of the text ({EVALUATED})")
    add("--json", action="store_true", help="print one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    chosen = quantization(options)
    require_new(options.target)
    if options.gguf is None and options.target.suffix == ".gguf":
        raise ValueError(f"out: expected a folder, or --gguf with a type for a GGUF file, got {options.target}")
    if options.gguf is not None:
        require_gguf()
    require_integer("evaluate_tokens", options.evaluate_tokens, 2, optional=True)
    if options.evaluate_tokens is not None and options.evaluate is None:
        raise ValueError(f"evaluate_tokens: expected --evaluate with it, got {options.evaluate_tokens} alone")
    text = None if options.evaluate is None else read_text(options.evaluate)
    if is_quantized(options):
        print_stderr(f"fastgpt: {options.source} is quantized already: quantizing it again adds to its error")
    began = time.perf_counter()
    result: dict[str, Any] = {"model": str(options.source), "out": str(options.target), "weights": chosen.dtype}
    result |= {"group_size": chosen.group_size, "minima": chosen.minima}
    if text is not None:
        pipe = pipeline(options.source, revision=options.revision, device="cpu", decoder_only=True)
        result |= perplexity(pipe, text, "before", options)
        del pipe
    pipe = pipeline(options.source, revision=options.revision, device="cpu", decoder_only=True, weights=chosen)
    before = bytes_of(options)
    write_file(pipe, options) if options.gguf else write_folder(pipe, options)
    matrices = [weight for weight in pipe.model.parameters() if isinstance(weight, QuantizedWeight)]
    result |= {"parameters": sum(weight.numel() for weight in pipe.model.parameters()), "matrices": len(matrices)}
    result |= {"bytes_before": before, "bytes": size_of(options.target), "seconds": round(time.perf_counter() - began, 3)}
    if text is not None:
        result |= perplexity(pipe, text, "after", options)
    if options.json:
        print(json.dumps(result))
        return
    sizes = f"{result['bytes'] / 1e6:,.1f} MB, before {before / 1e6:,.1f} MB"
    print(f"{options.target}: {result['parameters']:,} parameters in {sizes}")
    if text is not None:
        before, after = result["perplexity_before"], result["perplexity_after"]
        change = f"{before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.2f}%)"
        print(f"perplexity of {result['evaluated_tokens']:,} tokens: {change}")


def quantization(options: argparse.Namespace) -> Quantization:
    """Raises ValueError for options that contradict each other."""
    if options.gguf is None:
        if options.weights is None:
            raise ValueError(f"weights: expected {' or '.join(BITS)}, or --gguf with a type, got neither")
        group_size: Any = GROUPS[options.group_size or "32"]  # mypy drops the None of dataclasses in fastgpt.ops
        return Quantization(options.weights, group_size, options.minima)
    chosen = GGUF_TYPES[options.gguf]
    if options.weights not in (None, chosen.dtype):
        raise ValueError(f"weights: expected {chosen.dtype}, as {options.gguf} is, got {options.weights}")
    if options.group_size not in (None, "32"):
        raise ValueError(f"group_size: expected 32, as in all types of --gguf, got {options.group_size}")
    if options.minima and not chosen.minima:
        raise ValueError(f"minima: expected none with --gguf {options.gguf}, got some: q4_1 has minima")
    return chosen


def require_gguf() -> None:
    """Before the work, not after it."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"gguf: expected the package gguf, which writes GGUF files ({error}): pip install gguf") from error


def require_new(out: Path) -> None:
    """Raises ValueError for what exists: a model there may be the one that is read."""
    if os.path.lexists(require_path("out", out)):
        raise ValueError(f"out: expected a path that does not exist, {out} does")


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"evaluate: expected a file, {file} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate: expected a file with text in UTF-8, got {file}: {error}") from error


def perplexity(pipe: Pipeline, text: str, when: str, options: argparse.Namespace) -> dict:
    """The entries of the result for the perplexity `when`, "before" or "after". A terminal gets a progress bar."""
    tokens = torch.tensor(pipe.tokenizer.encode(text, name="evaluate"))[: options.evaluate_tokens or EVALUATED]
    window = min(WINDOW, pipe.model.config.context_length)
    if len(tokens) < 2:
        raise ValueError(f"evaluate: expected a text of at least two tokens, got {len(tokens)}")
    from tqdm import tqdm

    if not is_terminal(sys.stderr):
        print_stderr(f"fastgpt: perplexity {when}, of {len(tokens):,} tokens")
    with tqdm(total=len(tokens) - 1, desc=f"perplexity {when}", unit="token", leave=False, disable=None) as bar:
        loss = evaluate(pipe.model, tokens, context=window, overlap=window * OVERLAP // WINDOW, shown=bar.update)
    return {f"perplexity_{when}": math.exp(loss), "evaluated_tokens": len(tokens)}


def write_folder(pipe: Pipeline, options: argparse.Namespace) -> None:
    """The model and all files of its tokenizer."""
    model, tokenizer = pipe.model, pipe.tokenizer
    with writing("out", options.target, "a folder"), new_folder(options.target) as folder:
        if gguf_file.is_gguf(options.source):
            model.generation_defaults = model.generation_defaults | ({"eos": tokenizer.eos} if tokenizer.eos else {})
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            model.save_pretrained(folder)
            copy_companions(hub.resolve(options.source, options.revision), folder)
            tokenizer.save(folder / TOKENIZER)


def write_file(pipe: Pipeline, options: argparse.Namespace) -> None:
    if gguf_file.is_gguf(options.source):
        metadata, rotation = gguf_writer.metadata_of(gguf_file.read(options.source))
    else:
        metadata, rotation = gguf_writer.metadata_from(pipe.model)
        metadata |= {"general.name": Path(options.source).name} | gguf_from_tokenizer(
            pipe.tokenizer, pipe.model.config.vocab_size
        )
    with writing("out", options.target, "a file"), folders.made(options.target.parent), replacing(options.target) as temporary:
        gguf_writer.write(temporary, pipe.model, metadata, rotation)


def is_quantized(options: argparse.Namespace) -> bool:
    if gguf_file.is_gguf(options.source):
        return any(tensor.type in gguf_tensors.QUANTIZED for tensor in gguf_file.read(options.source).tensors.values())
    return (
        quantized_folders.scheme(transformers_format.read_config(hub.resolve(options.source, options.revision))[1]) is not None
    )


def bytes_of(options: argparse.Namespace) -> int:
    """Of the model that is quantized."""
    if gguf_file.is_gguf(options.source):
        return sum(part.stat().st_size for part in gguf_file.read(options.source).paths)
    return size_of(hub.resolve(options.source, options.revision))


def size_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else out.stat().st_size
