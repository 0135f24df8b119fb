"""Perplexities of quantized models, against that of the model as it is stored, dequantized.

python -m benchmarks.perplexity TEXT [NAME=MODEL ...]     writes results/<machine>/perplexity.json

TEXT is a file in UTF-8. The shipped model is always measured, on the last 10% of it, which was held out in its training if it is
tiny Shakespeare; each MODEL, a folder or a GGUF file, on its first tokens there. A window is of 1024 tokens or the model's context,
and overlaps the one before by half: each token is predicted once, from at least that many before it.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.perplexity_table import label, rows
from benchmarks.report import store
from benchmarks.table import aligned
from fastgpt import SHIPPED_MODEL, Quantization, QuantizedWeight, pipeline
from fastgpt.training.evaluation import evaluate

WINDOW = 1024
MOST = 8192  # tokens
CHOICES = [Quantization("int8"), Quantization("int8", None)]
CHOICES += [Quantization("int4", size, minima) for minima in (False, True) for size in (32, 64, 128)]


def measure(name: str, model: str | Path, text: str) -> list[dict]:
    """A case for the model as it is and one for each way to quantize it."""
    cases = []
    for weights in tqdm(["dequantized", *CHOICES], desc=name, leave=False, disable=None):
        case = {"model": name} | ({} if weights == "dequantized" else dataclasses.asdict(weights))
        try:
            pipe = pipeline(model, device="cpu", dtype=torch.float32, weights=weights)
        except ValueError as error:
            cases.append(case | {"left_out": str(error)})
            continue
        tokens = torch.tensor(pipe.tokenizer.encode(text))[:MOST]
        window = min(WINDOW, pipe.model.config.context_length)
        loss = evaluate(pipe.model, tokens, context=window, overlap=window // 2)
        parameters = list(pipe.model.parameters())
        case |= {"perplexity": math.exp(loss), "tokens": len(tokens), "window": window}
        case["bytes"] = sum(weight.nbytes for weight in parameters)
        case["quantized"] = sum(weight.numel() for weight in parameters if isinstance(weight, QuantizedWeight))
        cases.append(case)
        tqdm.write(f"{label(case)}: {case['perplexity']:.4f}")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    text = text[-(len(text) // 10) :]
    models = {"the shipped model": SHIPPED_MODEL} | dict(model.split("=", 1) for model in options.models)
    cases = [case for name, model in models.items() for case in measure(name, model, text)]
    print(aligned(rows(cases), "l" + "r" * len(models)))
    store("perplexity", {"perplexity": cases})


if __name__ == "__main__":
    main()
