"""Checkpoints of every family compared with transformers: errors of logits, and greedy tokens.

python -m benchmarks.families     prints them and writes results/<machine>/families.json

The checkpoints are tiny, with random weights, and created by transformers. Errors are fractions of the bounds of the numerics
contract: of logits against transformers in float64, loaded from its folder in fp32 and bf16 and from a GGUF file in fp32; of logits
with weights of 8 bits against these dequantized; of a gradient against transformers in float64. Tokens are 64 for a single prompt
and for a batch of prompts of 3 to 57 tokens, with each kind of cache and without one. Exits with 1 if a fraction is above 1, or a
token differs.
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

from family_checkpoints import (  # noqa: E402
    CONFIGS,
    GGUF_CONFIGS,
    PROMPTS,
    gradient_of,
    kinds_of_cache,
    logits_of,
    our_tokens,
    quantized_logits_of,
    their_tokens,
    theirs,
)
from gguf_files import write  # noqa: E402

from fastgpt.testing.numerics import compare  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)


def measure(case: str) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("folder", "float32", "bfloat16", "gguf", "int8"):
            (root / name).mkdir()
        folder = root / "folder"
        theirs(case).save_pretrained(folder)
        pairs = {}
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            pairs[name] = list(logits_of(case, folder, dtype, root / name))
        if case in GGUF_CONFIGS:
            path = write(theirs(case), root / "model.gguf")
            pairs["gguf"] = list(logits_of(case, folder, torch.float32, root / "gguf", path))
        pairs["int8"] = [quantized_logits_of(case, root / "int8")]
        pairs["gradient"] = [gradient_of(case, folder)]
        model = GPT.from_pretrained(folder)
    shares = {name: float(f"{max(compare(*pair).share for pair in found):.3g}") for name, found in pairs.items()}
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
    cases = [measure(case) for case in tqdm(CONFIGS | GGUF_CONFIGS, unit="checkpoint", leave=False, disable=None)]
    print(aligned(families_table.rows(cases), "l" + "r" * len(families_table.COLUMNS) + "l"))
    about = report.machine()
    report.store("families", {"families": cases}, about | {"peers": {"transformers": metadata.version("transformers")}})
    bad = [case["family"] for case in cases if max(case["shares"].values()) > 1 or not all(case["same_tokens"].values())]
    sys.exit(f"differ from transformers: {'; '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
