"""The tokenizer: every character of the corpus and back, streaming, and errors."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.text import Tokenizer

CORPUS = "Hello, wörld!\n\r\n\t  日本 😀"


@given(st.text(alphabet=sorted(set(CORPUS))))
def test_round_trip(text):
    tokenizer = Tokenizer.from_corpus(CORPUS)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


def test_ids_are_in_code_point_order():
    tokenizer = Tokenizer.from_corpus("cab")
    assert tokenizer.vocab_size == 3 and tokenizer.encode("abc") == [0, 1, 2]


def test_saving_and_loading(tmp_path):
    Tokenizer.from_corpus(CORPUS).save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.decode(loaded.encode(CORPUS)) == CORPUS


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"text: expected only the 3 characters .*, got '\?', 'é'$"):
        Tokenizer.from_corpus("abc").encode("aé?")
    with pytest.raises(ValueError, match="and more"):
        Tokenizer.from_corpus("abc").encode("0123456789")


def test_streaming_never_gives_half_a_character():
    """With a byte-level model, as GPT-2's, a character may be several tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(byte_level.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a😀é")
    assert len(ids) == 7
    assert list(tokenizer.decode_stream(ids)) == ["a", "😀", "é"]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer: expected the file .*tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: .*tokenizer.json is damaged"):
        Tokenizer.load(tmp_path / "tokenizer.json")
