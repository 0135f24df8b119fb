"""`fastgpt inspect`: from the tokens of a prompt to the most likely next ones, and to a plot of an attention pattern."""

import argparse
import json

import torch

from fastgpt.checks import require_integer
from fastgpt.cli.arguments import add_model, device_of, integer, path
from fastgpt.cli.prompts import read_prompt
from fastgpt.generation.pipeline import pipeline
from fastgpt.model import inspection
from fastgpt.model.encoder_states import require_causal
from fastgpt.model.inputs import require_room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] PROMPT"
    parser.description = "Prints the tokens of a prompt and the most likely next tokens."
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to look at; - reads standard input")
    add_model(add)
    add("--top", type=integer, default=10, metavar="N", help="how many next tokens to show (10)")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    add("--attention", type=path, metavar="FILE", help="save a plot of one head's attention pattern: .png, .svg, .pdf, ...")
    add("--layer", type=integer, metavar="L", help="layer of the plot, counted from 0 (0)")
    add("--head", type=integer, metavar="H", help="head of the plot, counted from 0 (0)")


def run(options: argparse.Namespace) -> None:
    """Tokens -> logits -> probabilities -> next token."""
    require_integer("top", options.top, least=1)
    for name in ("layer", "head"):
        if getattr(options, name) is None:
            setattr(options, name, 0)
        elif options.attention is None:
            raise ValueError(f"{name}: expected --attention with it, got --{name} alone")
    text = read_prompt(options.prompt)
    pipe = pipeline(options.model, revision=options.revision, device=device_of(options.device), decoder_only=True)
    model, tokenizer = pipe.model, pipe.tokenizer
    require_causal(model.config)
    prompt = tokenizer.encode(text, name="prompt")
    if not prompt:
        raise ValueError("prompt: expected at least one character, got an empty prompt")
    require_room("prompt", len(prompt), model.config)
    texts = [inspection.text_of(tokenizer, *pair) for pair in zip(prompt, [None, *prompt])]
    ids = torch.tensor([prompt], device=model.first_weight.device)
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
        for token, logit, probability in inspection.most_likely(logits[0, -1], options.top)
    ]
    tokens = [{"id": token, "text": text} for token, text in zip(prompt, texts)]
    if options.json:
        print(json.dumps({"tokens": tokens, "next": following, "greedy": following[0]}))
    else:
        print_predictions(tokens, following, model.config.vocab_size)


def print_predictions(tokens: list[dict], following: list[dict], vocab_size: int) -> None:
    """Prints the tokens of a prompt, and a table of the most likely next ones."""
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
