"""Tokenizers in GGUF files that we write: the same ids, special tokens and templates when they are read again."""

import json

import pytest
import tokenizers
from texts import CHATML, byte_fallback, byte_level
from tokenizers import pre_tokenizers

from fastgpt import SHIPPED_MODEL
from fastgpt.text.gguf_tokenizer import SPLITTINGS, tokenizer_from_gguf
from fastgpt.text.gguf_tokenizer_writer import gguf_from_tokenizer
from fastgpt.text.tokenizer import Tokenizer

TEXTS = ["The dog's 12345 tokens", "  Zwölf\n\n Boxkämpfer, 東京!", "<|start|>user\nthe dog<|end|>", ""]


def again(tokenizer, size=600):
    metadata = gguf_from_tokenizer(tokenizer, size)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == size
    return metadata, tokenizer_from_gguf(metadata)


def split_by(name):
    """A tokenizer whose texts are split as llama.cpp does by that name."""
    backend = byte_level()
    steps = [pre_tokenizers.Split(tokenizers.Regex(e), "isolated") for e in SPLITTINGS[name].expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return backend


@pytest.mark.parametrize("name", [None, "llama-bpe", "qwen2", "smollm", "gpt-4o", "deepseek-v3", "tekken", "default"])
def test_byte_level(name):
    """The name is that of the first of equal ways to split a text; None: GPT-2's own."""
    backend = byte_level() if name is None else split_by(name)
    tokenizer = Tokenizer(
        backend, special_tokens={"bos_token": "<|start|>", "eos_token": "<|eos|>"}, eos=[0, 2], chat_template=CHATML
    )
    metadata, read = again(tokenizer)
    found = SPLITTINGS[metadata["tokenizer.ggml.pre"]]
    assert found.expressions == SPLITTINGS[name or "gpt-2"].expressions
    assert [read.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert read.special_tokens == tokenizer.special_tokens and set(read.eos) == {0, 2} and read.chat_template == CHATML
    for text in TEXTS:
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_words_of_single_digits_as_smollm_has_them():
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    metadata, _ = again(Tokenizer(backend))
    assert metadata["tokenizer.ggml.pre"] == "smollm"


def test_sentencepiece():
    tokenizer = Tokenizer(
        byte_fallback(), special_tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, eos=[2],
        chat_template={"default": CHATML, "other": "x"},
    )  # fmt: skip
    metadata, read = again(tokenizer)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert [read.encode(text) for text in TEXTS[:3]] == [tokenizer.encode(text) for text in TEXTS[:3]]
    assert read.chat_template == tokenizer.chat_template and read.eos == [2]


def test_what_files_cannot_hold_is_named():
    with pytest.raises(ValueError, match="tokenizer: expected BPE, .*, got WordLevel"):
        gguf_from_tokenizer(Tokenizer.load(SHIPPED_MODEL / "tokenizer.json"), 65)
    with pytest.raises(ValueError, match="tokenizer: expected BPE, .*, got [0-9]+ tokens for a model of 299"):
        gguf_from_tokenizer(Tokenizer(byte_level()), 299)
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("o", "isolated"), backend.pre_tokenizer])
    with pytest.raises(ValueError, match="tokenizer: expected one that splits texts as llama.cpp can"):
        gguf_from_tokenizer(Tokenizer(backend), 400)


def test_saved_as_files(tmp_path):
    tokenizer = Tokenizer(
        byte_level(),
        special_tokens={"bos_token": "<|start|>", "eos_token": "<|eos|>"},
        chat_template={"default": "a", "b": "c"},
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    read = Tokenizer.from_folder(tmp_path)
    assert read.special_tokens == tokenizer.special_tokens and read.chat_template == tokenizer.chat_template
    assert read.eos == [2, 0] and read.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    with pytest.raises(OSError, match="folder: expected a folder that can be written to"):
        tokenizer.save_pretrained(tmp_path / "nowhere")
