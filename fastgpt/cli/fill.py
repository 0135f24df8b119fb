"""`fastgpt fill`: the most likely tokens for the masks of a text."""

import argparse
import dataclasses
import json

from fastgpt.cli.arguments import DTYPES, add_model, add_weights, device_of, integer
from fastgpt.cli.prompts import read_prompt
from fastgpt.encoding.pipeline import EncoderPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] TEXT"
    parser.description = "Prints the most likely tokens for each mask of a text, by a model with a masked-language head."
    parser.epilog = 'examples:\n  fastgpt fill "Paris is in [MASK]." --model google-bert/bert-base-uncased'
    add = parser.add_argument
    add("text", metavar="TEXT", help="the text, with masks such as [MASK] or <mask>; - reads standard input")
    add("--top-k", type=integer, default=5, metavar="N", help="tokens for each mask (5)")
    add("--json", action="store_true", help="print one JSON list for each mask instead of a table")
    add("--truncate", action="store_true", help="leave out what is beyond the model's greatest number of tokens (an error)")
    add_model(add, None)
    add_weights(add)


def run(options: argparse.Namespace) -> None:
    text = read_prompt(options.text)
    pipe = EncoderPipeline.from_pretrained(
        options.model, revision=options.revision, dtype=DTYPES.get(options.dtype), device=device_of(options.device),
        weights=options.weights,
    )  # fmt: skip
    (found,) = pipe.fill([text], options.top_k, truncate=options.truncate)
    masks = found if isinstance(found[0], list) else [found]
    for number, fillings in enumerate(masks, 1):
        if options.json:
            print(json.dumps([dataclasses.asdict(filling) for filling in fillings]))
            continue
        if len(masks) > 1:
            print(f"{'' if number == 1 else chr(10)}--- mask {number} of {len(masks)}")
        for filling in fillings:
            print(f"{filling.probability:>8.2%}  {filling.filled}")
