"""Speculation on three kinds of text: `python -m benchmarks.speculation NAME=MODEL [--dtype bfloat16]`.

    copying      a prompt holds a file twice and its beginning: the model goes on with the file
    free         answers to questions, or for a model without a chat template continuations of them
    adversarial  text sampled at a temperature at which nothing repeats itself

Tokens are compared first; then each text is generated with and without speculation in turn, and medians of decode speed compared.
The result is stored under NAME, with those of other models on this machine.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks import pages, report, speculation_table
from fastgpt.checkpoints.loading import MATRICES
from fastgpt.cli.arguments import DTYPES
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
    parser.add_argument("model", metavar="NAME=MODEL", help="a name for tables, and a checkpoint folder or a GGUF file")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--weights", choices=MATRICES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    name, _, model = options.model.partition("=")
    if not model:
        parser.error(f"expected NAME=MODEL, got {options.model!r}")
    pipe = pipeline(model, dtype=DTYPES.get(options.dtype), weights=options.weights)
    about = report.machine()
    others = pages.results_in(report.folder_of(about)).get("speculation", {}).get("speculation", [])
    cases = [case for case in others if case["model"] != name]
    for kind, prompts in texts(pipe).items():
        found = [measure(pipe, prompt, options.tokens, options.rounds, more) for prompt, more in prompts]
        # Of so many tokens of each prompt, the time is the sum of theirs.
        plain, speculative = (len(found) / sum(1 / each[name] for each in found) for name in ("plain", "speculative"))
        cases.append({
            "model": name, "text": kind, "prompts": len(found), "tokens": options.tokens, "plain": plain,
            "speculative": speculative, "tokens_per_pass": statistics.mean(each["tokens_per_pass"] for each in found),
        })  # fmt: skip
        print(speculation_table.markdown(cases[-1:]), flush=True)
    report.store("speculation", {"speculation": cases}, about)


if __name__ == "__main__":
    main()
