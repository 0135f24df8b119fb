"""Older tokenizer files: the ids of the libraries that they come from; tokens that other files add."""

import base64
import json
import random
import sys

import pytest
import sentencepiece
import transformers
from texts import byte_fallback, byte_level, write_folder, write_json, write_merges, write_sentencepiece

from fastgpt.text.tokenizer import Tokenizer

PARTS = ("the", "dog", " ", "  ", "token", "\n", "é", "日", "😀", "q", "▁", "\t", "ing", ".", "ﬁ", "'s", "42")


def random_texts(count):
    r = random.Random(0)
    return ["".join(r.choices(PARTS, k=r.randrange(12))) for _ in range(count)]


TRAINED = [
    {}, {"byte_fallback": False, "vocab_size": 120}, {"remove_extra_whitespaces": True}, {"add_dummy_prefix": False},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    {"user_defined_symbols": ["<sep>"], "pad_id": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", TRAINED, ids=str)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_gives_the_ids_of_the_library(kind, options, tmp_path):
    folder = write_sentencepiece(tmp_path, kind, **options)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.from_folder(folder)
    assert ours.vocab_size == theirs.get_piece_size() and ours.eos == [theirs.eos_id()] == [2]
    for text in random_texts(200):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids)
        # The library prints a sign of its own for what is unknown, and takes all ▁ away from the beginning of some texts.
        if theirs.unk_id() not in ids and not text.lstrip(" ").startswith("▁"):
            assert ours.decode(ids) == theirs.decode(ids)


def transformers_ids(folder, text):
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_gives_the_ids_of_transformers(add_bos, tmp_path):
    folder = write_sentencepiece(tmp_path)
    size = Tokenizer.from_folder(folder).vocab_size
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": add_bos, "add_eos_token": not add_bos,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True, "rstrip": True, "normalized": False}},
    }  # fmt: skip
    write_json(folder, {"tokenizer_config": config, "config": {"model_type": "llama"}})
    ours = Tokenizer.from_folder(folder)
    assert ours.backend.id_to_token(size) == "<|im_end|>"
    for text in ["the dog", "", "a<|im_end|> the</s>dog<s> x", "the\n\ndog é日", "<|im_end|>the"]:
        assert ours.encode(text) == transformers_ids(folder, text), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_give_the_ids_of_transformers(name, tmp_path):
    size = byte_level().get_vocab_size()
    config = {
        "tokenizer_class": name, "eos_token": "<|end|>", "unk_token": "<|eos|>", "bos_token": None, "pad_token": "<|eos|>",
        "added_tokens_decoder": {
            "0": {"content": "<|eos|>", "special": True}, "2": {"content": "<|end|>", "special": True},
            str(size): {"content": "<think>", "special": False, "normalized": False},
        },
    }  # fmt: skip
    folder = write_merges(tmp_path, tokenizer_config=config, config={"model_type": "gpt2"})
    ours = Tokenizer.from_folder(folder)
    assert ours.eos == [2] and ours.vocab_size == size + 1
    for text in [*random_texts(100), "a<|end|> b<think>c<|start|>", "I'LL don't 12345 x\n\n y", "e\u0301"]:
        assert ours.encode(text) == transformers_ids(folder, text), text
        assert ours.decode(ours.encode(text)) == transformers.AutoTokenizer.from_pretrained(folder).decode(
            ours.encode(text), skip_special_tokens=True
        )


def test_a_tokenizer_of_older_files_is_saved_as_tokenizer_json(tmp_path):
    (tmp_path / "saved").mkdir()
    for original in (write_merges(tmp_path / "a"), write_sentencepiece(tmp_path / "b")):
        write_json(original, {"added_tokens": {"<x>": Tokenizer.from_folder(original).vocab_size}})
        ours = Tokenizer.from_folder(original)
        ours.save(tmp_path / "saved" / "tokenizer.json")
        saved = Tokenizer.from_folder(tmp_path / "saved")
        for text in [*random_texts(50), "a<x>b"]:
            ids = ours.encode(text)
            assert saved.encode(text) == ids and saved.decode(ids) == ours.decode(ids)


def test_gpt2_as_it_was_published(tmp_path):
    """Two files, and <|endoftext|> in the vocabulary."""
    folder = write_merges(tmp_path)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = len(vocabulary)
    write_json(folder, {"vocab": vocabulary})
    ours = Tokenizer.from_folder(folder)
    assert ours.eos == [len(vocabulary) - 1] and ours.special_tokens["bos_token"] == "<|endoftext|>"
    assert ours.encode("a<|endoftext|>b")[1] == len(vocabulary) - 1 and ours.decode(ours.encode("a<|endoftext|>b")) == "ab"


WORDPIECE = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "dog",
    "The",
    "to",
    "##ken",
    "##ing",
    ".",
    "'",
    "s",
    "4",
    "##2",
    "日",
    "e",
    "é",
]


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_gives_the_ids_of_transformers(lower, tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in WORDPIECE))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    write_json(tmp_path, {"tokenizer_config": config, "config": {"model_type": "bert"}})
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.special_tokens["mask_token"] == "[MASK]" and ours.encode("The [MASK]")[0] == 2
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*random_texts(100), "The [MASK] é", "[CLS]the[SEP]dog", "日日"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode("the dog's token.")) == theirs.decode(
        theirs("the dog's token.")["input_ids"], skip_special_tokens=True
    )
    assert ours.backend.encode("the", "dog").type_ids == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\n" * 2, "expected distinct tokens, got 1 in 2 lines"),
        ("a\nb\n", r"expected the token \[UNK\] on one of its lines"),
        (b"\xff", "expected text in UTF-8"),
    ],
)
def test_damaged_wordpiece_is_named(content, message, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^tokenizer: .*vocab.txt is damaged: {message}"):
        Tokenizer.from_folder(tmp_path)


# Special tokens of other files


@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "lstrip": False}], ids=["text", "dict"])
def test_special_tokens_that_only_special_tokens_map_names(token, tmp_path):
    folder = write_folder(tmp_path, byte_level(special=["<|eos|>"]), special_tokens_map={"eos_token": token, "pad_token": None})
    assert Tokenizer.from_folder(folder).special_tokens == {"eos_token": "<|end|>"} and Tokenizer.from_folder(folder).eos == []
    size = byte_level(special=["<|eos|>"]).get_vocab_size()
    write_json(folder, {"added_tokens": {"<|end|>": size}})
    ours = Tokenizer.from_folder(folder)
    assert ours.eos == [size] and ours.encode("a<|end|>")[-1] == size and ours.decode(ours.encode("a<|end|>b")) == "ab"
    write_json(folder, {"tokenizer_config": {"eos_token": "<|eos|>"}})  # which goes before
    assert Tokenizer.from_folder(folder).special_tokens == {"eos_token": "<|eos|>"}


def test_ordinary_tokens_that_are_named_special_are_special(tmp_path):
    """<s> and </s> stand in the vocabulary only, as in many older files."""
    content = json.loads(byte_fallback().to_str())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_folder(tmp_path).encode("</s>", special=False)) > 1
    write_json(tmp_path, {"special_tokens_map": {"eos_token": "</s>", "additional_special_tokens": ["<s>"]}})
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("</s><s>", special=False) == [2, 1] and ours.decode([2, 1]) == "" and ours.eos == [2]


# Errors

DAMAGED = [
    ("vocab.json", "[]", "vocab.json is damaged: expected a JSON object, got a list"),
    ("vocab.json", '{"a": 0, "b": 0}', "vocab.json is damaged: expected a distinct id for each token"),
    ("vocab.json", '{"a": -1}', "vocab.json is damaged: expected a distinct id for each token"),
    ("vocab.json", "[" * 100_000, "vocab.json is damaged: "),
    ("merges.txt", "t h e\n", r"merges.txt is damaged: expected two tokens .* got \('t', 'h', 'e'\)"),
    ("merges.txt", "zz qq\n", r"merges.txt is damaged: expected two tokens .* got \('zz', 'qq'\)"),
    ("merges.txt", b"\xff\xfe", "merges.txt is damaged: expected text in UTF-8"),
    ("tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', "expected a tokenizer.json, or a tokenizer_class"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "tokenizer_config.json is damaged: an"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "y"}}', "tokenizer_config.json is damaged: added_tokens_decoder"),
    ("tokenizer_config.json", '{"chat_template": 5}', "tokenizer_config.json is damaged: chat_template: expected texts"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "tokenizer_config.json is damaged: chat_template"),
    ("added_tokens.json", '{"<new>": 99999}', "expected added tokens that follow on the vocabulary, '<new>' has the id 99999"),
    ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json is damaged: eos_token_id: expected ids"),
    ("config.json", '{"eos_token_id": [[1]]}', r"config.json is damaged: eos_token_id: expected ids, got \[\[1\]\]"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja is damaged: expected text in UTF-8"),
    ("tokenizer.model", b"\x00\x01", "tokenizer.model is damaged: "),
    ("tokenizer.model", b"", "tokenizer.model is damaged: expected distinct pieces"),
    ("tokenizer.model", base64.b64encode(b"hello") + b" 0\n", "tokenizer.model is in tiktoken's format: expected"),
    ("tokenizer.json", b"\xff", "tokenizer.json is damaged: expected text in UTF-8"),
]


@pytest.mark.parametrize("name, content, message", DAMAGED, ids=[f"{entry[0]} {entry[2][:40]}" for entry in DAMAGED])
def test_damaged_files_are_named(name, content, message, tmp_path):
    folder = write_merges(tmp_path)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^tokenizer: .*{message}"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_without_the_libraries_of_a_format(missing, tmp_path, monkeypatch):
    folder = write_sentencepiece(tmp_path)
    for name in [name for name in sys.modules if name.startswith(("sentencepiece", "google.protobuf"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    message = "^tokenizer: expected the libraries sentencepiece and protobuf, .*: pip install sentencepiece protobuf$"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)


def test_libraries_of_a_format_that_do_not_go_together(tmp_path, monkeypatch):
    """As where protobuf is newer than what was generated for it."""
    folder = write_sentencepiece(tmp_path)

    class Fails:
        def find_spec(self, name, *_):
            if name == "sentencepiece.sentencepiece_model_pb2":
                raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, ...")

    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    with pytest.raises(ValueError, match="^tokenizer: .*, got Descriptors cannot be created directly: pip install [a-z ]+$"):
        Tokenizer.from_folder(folder)
