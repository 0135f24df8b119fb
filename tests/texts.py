"""Tokenizers as models have them, made here, and checkpoint folders with one; for tests."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from models import random_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Words that words are made of: a token, another token, and one more token.\n\nA new paragraph.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]
CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_level(special=("<|eos|>", "<|start|>", "<|end|>")) -> tokenizers.Tokenizer:
    """As GPT-2's: pairs of bytes are merged, so characters may be cut."""
    result = tokenizers.Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator(CORPUS, trainer)
    return result


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama's: spaces are ▁, one is put before a text; unknown characters are bytes; a bos comes first."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    # Bytes are ordinary tokens, which the trainer cannot be told.
    content = json.loads(trained.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    result = tokenizers.Tokenizer.from_str(json.dumps(content))
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return result


def write_merges(folder: Path, **files) -> Path:
    """vocab.json and merges.txt instead of tokenizer.json, as GPT-2 was published."""
    model = json.loads(byte_level().to_str())["model"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_json(folder, files)


def write_sentencepiece(folder: Path, kind: str = "bpe", files: dict | None = None, **options) -> Path:
    """tokenizer.model, trained with these options of SentencePiece."""
    options = {
        "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2,
    } | options  # fmt: skip
    model = io.BytesIO()
    sentences = iter(CORPUS * 3)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, model_type=kind, **options)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return write_json(folder, files or {})


def write_json(folder: Path, files: dict) -> Path:
    """name without .json -> content."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **files) -> Path:
    """tokenizer.json and other files: name without .json -> content."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return write_json(folder, files)


def write_checkpoint(folder: Path, backend: tokenizers.Tokenizer, **files) -> Path:
    """A folder with a small random model as well."""
    random_model(vocabulary=backend.get_vocab_size(), context=160).save_pretrained(folder)
    return write_folder(folder, backend, **files)
