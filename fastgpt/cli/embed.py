"""`fastgpt embed`: the embeddings of texts, as lines of JSON or as a file of NumPy's."""

import argparse
import json
import sys
from collections.abc import Iterable

import numpy as np
import torch

from fastgpt.checks import is_terminal, writing
from fastgpt.cli.arguments import DTYPES, add_model, add_weights, device_of, integer, path, path_or_id
from fastgpt.cli.prompts import read_prompts
from fastgpt.encoding.pipeline import BATCH_TOKENS, EncoderPipeline
from fastgpt.encoding.sentences import POOLINGS
from fastgpt.generation.many import Interrupted

EXAMPLES = """\
examples:
  fastgpt embed "A cat." --model sentence-transformers/all-MiniLM-L6-v2
  fastgpt embed --texts sentences.txt --model PATH_OR_ID --out rows.npy
  fastgpt embed "Who purrs?" --model PATH_OR_ID --prompt-name query --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s [options] [TEXT ...]", EXAMPLES
    parser.description = "Prints the embedding of each text by a sentence model, a JSON list on each line."
    add = parser.add_argument
    add("text", nargs="*", metavar="TEXT", help="a text, one or several; - reads one from standard input, which is also read if "
        "there is no TEXT and something is piped in")  # fmt: skip
    add("--texts", type=path_or_id, metavar="FILE", help="read texts from FILE, in UTF-8, one on each line; empty lines are left "
        "out")  # fmt: skip
    add("--out", type=path, metavar="FILE", help="write all embeddings to FILE, a .npy of NumPy's, and print none")
    add("--truncate", action="store_true", help="leave out what is beyond the model's greatest number of tokens (an error)")
    add("--prompt-name", metavar="NAME", help="the model's prompt of that name goes before each text, as sentence-transformers' "
        "prompt_name (the model's default, if it has one)")  # fmt: skip
    add("--prompt", metavar="TEXT", help="TEXT goes before each text, such as 'query: '; '' for none")
    add("--pooling", choices=POOLINGS, metavar="P", help="mean: of all tokens; first, or cls: the first token (the model's)")
    add(
        "--json",
        action="store_true",
        help="print a JSON object for each text, with text and embedding, instead of the list alone",
    )
    add("--batch-tokens", type=integer, default=BATCH_TOKENS, metavar="N", help=f"tokens of a batch ({BATCH_TOKENS})")
    add_model(add, None)
    add_weights(add)


def run(options: argparse.Namespace) -> None:
    if options.json and options.out is not None:
        raise ValueError(f"json: expected none with --out, which prints nothing, got --out {options.out}")
    texts = read_prompts(options.text, lines_of=options.texts, option="texts")
    if not texts:
        raise ValueError("text: expected at least one, on the command line, in --texts or from standard input, got none")
    pipe = EncoderPipeline.from_pretrained(
        options.model, revision=options.revision, dtype=DTYPES.get(options.dtype), device=device_of(options.device),
        weights=options.weights,
    )  # fmt: skip
    named = {name: getattr(options, name) for name in ("batch_tokens", "truncate", "pooling", "prompt_name", "prompt")}
    shown = texts if options.json else None
    try:
        embeddings = pipe.embed(texts, progress=is_terminal(sys.stderr), **named).cpu()
    except Interrupted as interrupted:
        if options.out is None:
            print_rows(interrupted.results, shown)
        raise
    if options.out is None:
        print_rows(embeddings, shown)
        return
    with writing("out", options.out, "a file"), options.out.open("wb") as file:
        np.save(file, embeddings.numpy())


def print_rows(rows: Iterable[torch.Tensor | None], texts: list[str] | None = None) -> None:
    """A JSON list of each on a line, of None null; with texts, an object with both."""
    for number, row in enumerate(rows):
        # Digits that tell all numbers of fp32 apart.
        embedding = None if row is None else [float(format(x, ".9g")) for x in row.tolist()]
        print(json.dumps(embedding if texts is None else {"text": texts[number], "embedding": embedding}))
