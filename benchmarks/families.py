"""Checkpoints of every family compared with transformers: errors of logits, and greedy tokens.

python -m benchmarks.families     prints them and writes results/<machine>/families.json

The checkpoints are tiny, with random weights, and created by transformers. Errors are those of logits against transformers in
float64, as fractions of the bounds of the numerics contract; tokens are 64 for a single prompt and for a batch of prompts of 3 to
57 tokens, with each kind of cache and without one. Exits with 1 if a fraction is above 1, or a token differs.
"""

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import families_table, report
from benchmarks.table import aligned
from fastgpt import GPT

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for its helpers

from family_checkpoints import CONFIGS, PROMPTS, kinds_of_cache, logits_of, our_tokens, their_tokens, theirs  # noqa: E402

from fastgpt.testing.numerics import compare  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)


def measure(case: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        theirs(case).save_pretrained(folder)
        shares = {}
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as rounded:
                found = [compare(*each).share for each in logits_of(case, folder, dtype, rounded)]
            shares[str(dtype).removeprefix("torch.")] = float(f"{max(found):.3g}")
        model = GPT.from_pretrained(folder)
    expected = [their_tokens(case, prompts) for prompts in (PROMPTS[:1], PROMPTS)]
    kinds = {
        options.get("cache", "contiguous" if options.get("use_cache", True) else "none"): options
        for options in kinds_of_cache(model)
    }
    same = {
        kind: all(our_tokens(model, prompts, **options) == tokens for prompts, tokens in zip((PROMPTS[:1], PROMPTS), expected))
        for kind, options in kinds.items()
    }
    return {"family": case, "shares": shares, "same_tokens": same}


def main() -> None:
    cases = [measure(case) for case in tqdm(CONFIGS, unit="checkpoint", leave=False, disable=None)]
    print(aligned(families_table.rows(cases), "lrrl"))
    about = report.machine()
    report.store("families", {"families": cases}, about | {"peers": {"transformers": metadata.version("transformers")}})
    bad = [case["family"] for case in cases if max(case["shares"].values()) > 1 or not all(case["same_tokens"].values())]
    sys.exit(f"differ from transformers: {'; '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
