"""`fastgpt embed`: the embeddings of texts, as lines of JSON or as a file of NumPy's."""

import argparse
import json
import sys
from collections.abc import Iterable

import numpy as np
import torch

from fastgpt.checks import is_terminal, writing
from fastgpt.cli.arguments import DTYPES, add_model, device_of, integer, path, path_or_id
from fastgpt.cli.prompts import read_prompts
from fastgpt.encoding.pipeline import BATCH_TOKENS, EncoderPipeline
from fastgpt.generation.many import Interrupted

EXAMPLES = """\
examples:
  fastgpt embed "A cat." --model sentence-transformers/all-MiniLM-L6-v2
  fastgpt embed --texts sentences.txt --model PATH_OR_ID --out rows.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "%(prog)s [options] [TEXT ...]", EXAMPLES
    parser.description = "Prints the embedding of each text by a sentence model, a JSON list on each line."
    add = parser.add_argument
    add("prompt", nargs="*", metavar="TEXT", help="a text, one or several; - reads one from standard input, which is also read if "
        "there is no TEXT and something is piped in")  # fmt: skip
    add("--texts", type=path_or_id, metavar="FILE", help="read texts from FILE, in UTF-8, one on each line; empty lines are left "
        "out")  # fmt: skip
    add("--out", type=path, metavar="FILE", help="write all embeddings to FILE, a .npy of NumPy's, and print none")
    add("--truncate", action="store_true", help="leave out what is beyond the model's greatest number of tokens (an error)")
    add("--batch-tokens", type=integer, default=BATCH_TOKENS, metavar="N", help=f"tokens of a batch ({BATCH_TOKENS})")
    add_model(add, None)
    add("--dtype", choices=DTYPES, metavar="D", help=f"dtype of the weights: {', '.join(DTYPES)} (as stored)")


def run(options: argparse.Namespace) -> None:
    texts = read_prompts(options.prompt, lines_of=options.texts, option="texts")
    if not texts:
        raise ValueError("text: expected at least one, on the command line, in --texts or from standard input, got none")
    pipe = EncoderPipeline.from_pretrained(
        options.model, revision=options.revision, dtype=DTYPES.get(options.dtype), device=device_of(options.device)
    )
    progress = is_terminal(sys.stderr)
    try:
        embeddings = pipe.embed(texts, batch_tokens=options.batch_tokens, truncate=options.truncate, progress=progress).cpu()
    except Interrupted as interrupted:
        if options.out is None:
            print_rows(interrupted.results)
        raise
    if options.out is None:
        print_rows(embeddings)
        return
    with writing("out", options.out, "a file"), options.out.open("wb") as file:
        np.save(file, embeddings.numpy())


def print_rows(rows: Iterable[torch.Tensor | None]) -> None:
    """A JSON list of each on a line, of None null."""
    for row in rows:
        # Digits that tell all numbers of fp32 apart.
        print(json.dumps(None if row is None else [float(format(x, ".9g")) for x in row.tolist()]))
