"""`fastgpt quantize`: a model with matrices of 8 or 4 bits, as a folder or a GGUF file."""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from fastgpt import folders
from fastgpt.checkpoints import gguf_file, gguf_writer, hub
from fastgpt.checkpoints.files import TOKENIZER
from fastgpt.checks import require_path, writing
from fastgpt.cli.arguments import path, path_or_id
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
Quantizes the matrices of a model to 8 or 4 bits a number, and writes it to OUT, a new folder that is loaded as any other,
in the same bits; or with --gguf a new GGUF file, which llama.cpp runs, too. With int4, the token embedding and the output
matrix take 8 bits."""
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
    add("--weights", choices=BITS, metavar="D", help=f"{' or '.join(BITS)}; with --gguf, its type says it")
    add("--group-size", choices=GROUPS, metavar="N", help=f"numbers that share a scale: {', '.join(GROUPS)} (32)")
    add("--minima", action="store_true", help="each group has a minimum, too, besides its scale")
    add("--gguf", choices=GGUF_TYPES, metavar="TYPE", help=f"write a GGUF file in {', '.join(GGUF_TYPES)}")
    add("--evaluate", type=path, metavar="TEXT", help=f"print perplexities before and after on the text in this file, in windows "
        f"of {WINDOW} tokens, of which the last {WINDOW - OVERLAP} count")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    chosen = quantization(options)
    require_new(options.target)
    text = None if options.evaluate is None else read_text(options.evaluate)
    began = time.perf_counter()
    result: dict[str, Any] = {"model": str(options.source), "out": str(options.target), "weights": chosen.dtype}
    result |= {"group_size": chosen.group_size, "minima": chosen.minima}
    if text is not None:
        pipe = pipeline(options.source, revision=options.revision, device="cpu")
        result["perplexity_before"] = perplexity(pipe, text, "before")
        del pipe
    pipe = pipeline(options.source, revision=options.revision, device="cpu", weights=chosen)
    write_file(pipe, options) if options.gguf else write_folder(pipe, options)
    matrices = [weight for weight in pipe.model.parameters() if isinstance(weight, QuantizedWeight)]
    result |= {"parameters": sum(weight.numel() for weight in pipe.model.parameters()), "matrices": len(matrices)}
    result |= {"bytes": size_of(options.target), "seconds": time.perf_counter() - began}
    if text is not None:
        result["perplexity_after"] = perplexity(pipe, text, "after")
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.target}: {result['parameters']:,} parameters in {result['bytes'] / 1e6:,.1f} MB")
    if text is not None:
        before, after = result["perplexity_before"], result["perplexity_after"]
        print(f"perplexity: {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.2f}%)")


def quantization(options: argparse.Namespace) -> Quantization:
    """Raises ValueError for options that contradict each other."""
    if options.gguf is None:
        if options.weights is None:
            raise ValueError(f"weights: expected {' or '.join(BITS)}, or a type of --gguf, got neither")
        return Quantization(options.weights, GROUPS[options.group_size or "32"], options.minima)
    chosen = GGUF_TYPES[options.gguf]
    for name, given, same in (
        ("weights", options.weights, (None, chosen.dtype)), ("group_size", options.group_size, (None, "32")),
        ("minima", options.minima, (False, chosen.minima)),
    ):  # fmt: skip
        if given not in same:
            raise ValueError(f"{name}: expected none, or as --gguf {options.gguf} has it, got {given}")
    return chosen


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


def perplexity(pipe: Pipeline, text: str, when: str) -> float:
    tokens = torch.tensor(pipe.tokenizer.encode(text, name="evaluate"))
    window = min(WINDOW, pipe.model.config.context_length)
    if len(tokens) < 2:
        raise ValueError(f"evaluate: expected a text of at least two tokens, got {len(tokens)}")
    from tqdm import tqdm

    with tqdm(total=len(tokens) - 1, desc=f"perplexity {when}", unit="token", leave=False, disable=None) as bar:
        loss = evaluate(pipe.model, tokens, context=window, overlap=window * OVERLAP // WINDOW, shown=bar.update)
    return math.exp(loss)


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


def size_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else out.stat().st_size
