"""From the path of a checkpoint to what goes from texts to texts, or to embeddings."""

from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoints import gguf_file, hub, transformers_format
from fastgpt.checks import shown
from fastgpt.encoding.pipeline import EncoderPipeline
from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation import pipeline as generation
from fastgpt.ops.quantized_weight import Quantization


def pipeline(
    path: str | Path = SHIPPED_MODEL,
    *, revision: str | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    weights: str | Quantization | None = None, lora: str | Path | None = None,
) -> Any:  # fmt: skip
    """Loads a checkpoint to go from text to text, or that of an encoder alone to go from text to embeddings.

        pipe = fastgpt.pipeline("path/to/checkpoint")
        print(pipe("Once upon a time", max_new_tokens=50, temperature=0.8))

    Args:
        path: what `GPT.from_pretrained`, `EncoderDecoder.from_pretrained` or `Encoder.from_pretrained` takes, with the files of
            a tokenizer: see `Tokenizer.from_folder`; a GGUF file has its own. Default: the character-level model of Shakespeare
            that comes with the package.
        revision: of a model on the Hugging Face Hub: a branch, a tag or a commit; default its main branch.
        dtype: of the weights; default as stored.
        device: default a GPU if there is one.
        weights: None, "int8", "int4", a `Quantization` or "dequantized", as in `GPT.from_pretrained`.
        lora: as in `GPT.from_pretrained`; None for an encoder, alone or with a decoder.

    Returns: a `Pipeline`, or for the checkpoint of an encoder an `EncoderPipeline`.
    Raises: FileNotFoundError, ValueError that says what is missing or damaged.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights}
    if not gguf_file.is_gguf(path):
        folder = hub.resolve(path, revision)
        if transformers_format.read_config(folder)[0].encoder:
            if lora is not None:
                raise ValueError(f"lora: expected None for an encoder, got {shown(lora)}")
            return EncoderPipeline.from_pretrained(folder, **options)
        path, revision = folder, None
    return generation.pipeline(path, revision=revision, lora=lora, **options)
