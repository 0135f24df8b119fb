"""The validation loss of the shipped model, also with 8-bit caches.

python -m benchmarks.shipped_model TEXT     (the file it was trained on; its last 10% was held out)
"""

import sys
from pathlib import Path

import torch

from benchmarks.report import store
from fastgpt import GPT, SHIPPED_MODEL
from fastgpt.cli.arguments import CACHE_DTYPES
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.evaluation import evaluate, split


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    tokens = torch.tensor(Tokenizer.load(SHIPPED_MODEL / "tokenizer.json").encode(text))
    held_out = split(tokens, model.config.context_length)[1]
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (SHIPPED_MODEL / "model.safetensors").stat().st_size,
        "validation_loss": evaluate(model, held_out),
        "validation_loss_by_cache_dtype": {
            name: evaluate(model, held_out, cache_dtype=dtype) for name, dtype in CACHE_DTYPES.items()
        },
        "validation_characters": len(held_out),
    }
    print(result)
    store("training", result)


if __name__ == "__main__":
    main()
