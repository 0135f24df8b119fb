"""Tiny encoders with a tokenizer of words and characters, in folders."""

import json
from pathlib import Path

import torch
from models import random_encoder

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "dog",
    "cat",
    "sat",
    "on",
    "mat",
    "##s",
    "##ting",
    ".",
    ",",
    "query",
    ":",
]
LETTERS = [prefix + chr(c) for prefix in ("", "##") for c in range(ord("a"), ord("z") + 1)]
VOCABULARY = list(dict.fromkeys(WORDS + LETTERS))
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
TEXTS = [
    "the dog sat on the mat.", "the cat", "cats, dogs.", "", "query: sitting", "the dog " * 11, "on", "Mat", "a b c d e f g h", "the",
]  # fmt: skip


def write_json(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def sentence_model(folder: Path, *, modules: list | None = MODULES, pooling: dict | None = None, sentence: dict | None = None,
                   prompts: dict | None = None, dtype: torch.dtype = torch.float32, **fields) -> Path:  # fmt: skip
    """A checkpoint of BERT's architecture with a vocab.txt; modules, pooling, sentence, prompts: contents of the files of
    sentence-transformers, without those that are None."""
    model = random_encoder(vocabulary=len(VOCABULARY), context=40, norm_eps=1e-12, **fields)
    model.to(dtype).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    if modules is not None:
        write_json(folder / "modules.json", modules)
        write_json(folder / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    if sentence is not None:
        write_json(folder / "sentence_bert_config.json", sentence)
    if prompts is not None:
        write_json(folder / "config_sentence_transformers.json", prompts)
    return folder
