"""Speculation on three kinds of text: `python -m benchmarks.speculation MODEL [--dtype bfloat16]`.

    copying      a prompt holds a file twice and its beginning: the model goes on with the file
    free         answers to questions, or for a model without a chat template continuations of them
    adversarial  text sampled at a temperature at which nothing repeats itself

Tokens are compared first; then each text is generated with and without speculation in turn, and medians of decode speed compared.
"""

import argparse
import statistics
from pathlib import Path

import torch

from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation.pipeline import Pipeline, as_messages, pipeline

FILE = Path(__file__).with_name("decoding.py")
QUESTIONS = [
    "Explain how a bicycle stays upright, and give advice to somebody who learns to ride.",
    "Write a short story about a lighthouse keeper and a lost ship.",
    "What are the main causes of the French Revolution?",
    "Give me a recipe for vegetable soup.",
    "How does photosynthesis work?",
    "What should I consider when I buy a used car?",
    "Write a letter to a friend about a journey to Norway.",
    "Explain the difference between a virus and a bacterium.",
]


def texts(pipe: Pipeline) -> dict[str, list[tuple]]:
    """Prompts and options by the kind of text."""
    code = FILE.read_text()[:1200]
    known = (
        "".join(c for c in code if pipe.tokenizer.backend.token_to_id(c) is not None)
        if pipe.model.config.vocab_size < 256
        else code
    )
    longest = pipe.model.config.context_length // 5  # characters: for a character-level model
    known = known[:longest] if pipe.model.config.vocab_size < 256 else known
    ask = as_messages if pipe.tokenizer.chat_template is not None else str
    return {
        "copying": [(known + "\n\n" + known + "\n\n" + known[:100], {})],
        "free": [(ask(question), {}) for question in QUESTIONS],
        "adversarial": [("The ", {"temperature": 1.5, "seed": seed}) for seed in range(2)],
    }


def measure(pipe: Pipeline, prompt: str | list, new: int, rounds: int, options: dict) -> dict:
    """Speeds in tokens per second without and with speculation, and tokens per pass."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    tokens = {}
    for _ in range(rounds + 1):
        for speculates in speeds:
            run = pipe.start([prompt], new, eos=None, **options, **({"speculate": "prompt"} if speculates else {}))
            (row,) = run.finish()
            tokens[speculates] = row.tokens
            speeds[speculates].append(run.tokens_per_second or 0.0)
        assert tokens[True] == tokens[False], "speculation has changed tokens"
    plain, speculative = (statistics.median(values[1:]) for values in speeds.values())  # the first round records
    return {"plain": plain, "speculative": speculative, "tokens_per_pass": run.tokens_per_pass}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(SHIPPED_MODEL))
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--only", default=None, help="one kind of text")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first prompts of each kind")
    parser.add_argument("--most", type=int, default=None, help="as many prompts of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    pipe = pipeline(options.model, dtype=dtype, weights=options.weights)
    print("| text | plain, tok/s | speculative, tok/s | ratio | tokens a pass |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, prompts in texts(pipe).items():
        if options.only not in (None, kind):
            continue
        results = [
            measure(pipe, prompt, options.tokens, options.rounds, more)
            for prompt, more in prompts[options.skip :][: options.most]
        ]
        seconds = {name: sum(1 / result[name] for result in results) for name in ("plain", "speculative")}
        plain, speculative = (len(results) / seconds[name] for name in ("plain", "speculative"))
        rate = statistics.mean(result["tokens_per_pass"] for result in results)
        print(f"| {kind} | {plain:.1f} | {speculative:.1f} | {speculative / plain:.2f} | {rate:.2f} |", flush=True)


if __name__ == "__main__":
    main()
