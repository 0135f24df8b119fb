"""The tokenizer in the metadata of a GGUF file: the token ids that llama.cpp gives.

Either byte-level BPE (`tokenizer.ggml.model` is "gpt2"), with one of many ways to split a text into words, or SentencePiece's
BPE ("llama"), which merges by the scores of tokens and writes characters without a token as bytes.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fastgpt.text.tokenizer import Tokenizer
from fastgpt.text.tokenizer_files import shown
from fastgpt.text.vocabularies import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, add_bos_and_eos

PREFIX = "tokenizer.ggml."
TYPES = range(7)  # of tokens; 0 is undefined, 5 unused, 6 a byte
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}  # in keys -> in templates
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the metadata do not name them
# Files may call these ordinary tokens, and name only one of them eos: llama.cpp knows by their texts that they end a turn.
END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip

# How texts are split into words. Each expression splits the pieces that those before it left, into matches and what is between.

ENDINGS = r"'(?:[sdmt]|ll|re|ve)"
ENDINGS_ANY_CASE = r"'(?:[sSdDmMtT]|[lL][lL]|[rR][eE]|[vV][eE])"
LAST_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS = r"\p{N}{1,3}"
GPT2 = rf"{ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
# Letters in upper and in lower case. llama.cpp tells these apart in ASCII only.
UPPER, LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"


def _words(digits: str, letters: str = r"\p{L}") -> str:
    """As Llama 3 splits: endings, letters with the character before them, digits, other characters, white space."""
    return rf"{ENDINGS_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{LAST_SPACES}"


def _words_by_case(digits: str, ending: str = "") -> str:
    """Letters in lower case end a word that letters in upper case may begin."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    letters = rf"{begin}{UPPER}*{LOWER}+{ending}|{begin}{UPPER}+{LOWER}*{ending}"
    return rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LAST_SPACES}"


# Cased letters of the Unicode version and blocks that DeepSeek's first tokenizer knows.
DEEPSEEK_LETTERS = (
    r"[[\p{Lu}\p{Ll}\p{Lt}\x{295}]&&[^\x{560}-\x{588}\x{10C7}\x{10CD}\x{10D0}-\x{10FF}\x{1C80}-\x{1C8A}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB6D}\x{10570}-\x{105BC}\x{10D50}-\x{10D85}\x{16E40}-\x{16ED3}\x{1D400}-\x{1D7CB}"
    r"\x{1DF00}-\x{1DF96}]]"
)
DEEPSEEK_PUNCTUATION = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]"
DEEPSEEK_ASIAN = r"[[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]&&\S]+"
DEEPSEEK_3 = (
    THREE_DIGITS,
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + LAST_SPACES,
)
BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"


@dataclass(frozen=True)
class Splitting:
    """How a text is split before its bytes are merged.

    Args:
        whole_words: whether a word that is a token is that token, whatever the merges would make of it.
        add_bos: whether a bos token comes first unless the metadata say otherwise.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


LLAMA_3, QWEN_2, GPT_2 = Splitting((_words(THREE_DIGITS),)), Splitting((_words(r"\p{N}"),)), Splitting((GPT2,))
LLAMA_3_WHOLE = Splitting(LLAMA_3.expressions, whole_words=True, add_bos=True)
SINGLE_DIGITS = Splitting((r"\p{N}", GPT2))
GPT_4O = Splitting((_words_by_case(THREE_DIGITS, f"(?:{ENDINGS_ANY_CASE})?"),))
# By tokenizer.ggml.pre.
SPLITTINGS = {
    "default": Splitting((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "modern-bert", "trillion", "granite-docling",
         "exaone4"), GPT_2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), LLAMA_3_WHOLE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), LLAMA_3),
    **dict.fromkeys(("glm4", "glm5"), Splitting(LLAMA_3.expressions, whole_words=True)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "grok-2", "kormo", "bailingmoe",
         "bailingmoe2", "llada-moe"), QWEN_2
    ),
    "qwen35": Splitting((_words(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    "minicpm5": Splitting((THREE_DIGITS, _words(r"\p{N}+")), whole_words=True),
    "seed-coder": Splitting(
        (rf"{ENDINGS_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LAST_SPACES}",)
    ),
    "tekken": Splitting((_words_by_case(r"\p{N}"),), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), GPT_4O),
    "falcon": Splitting((r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Splitting(
        (r"[\r\n]", rf"\s?{DEEPSEEK_LETTERS}+", rf"\s?{DEEPSEEK_PUNCTUATION}+", r"\s+\z", DEEPSEEK_ASIAN, r"\p{N}+")
    ),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_ASIAN, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Splitting(DEEPSEEK_3)),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), Splitting((BLOOM,))),
    "viking": Splitting((BLOOM, r"\p{N}")),
}  # fmt: skip


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe: key -> number, bool, text or list of these.

    These are read: `tokenizer.ggml.` with model, pre, tokens, scores, token_type, merges, add_bos_token, add_eos_token,
    add_space_prefix and bos_, eos_, eot_, eom_, unknown_ and padding_token_id; `tokenizer.chat_template`, alone or with a name
    after a period; and general.name, by which llama.cpp knows Phi-3.

    A text is first split at control, unknown and user-defined tokens. Control and unknown tokens are special: `decode` skips
    them. The end-of-sequence tokens are those of the metadata and all whose text ends a turn.

    Raises: ValueError that names the key, for metadata that are missing, damaged or of a tokenizer that is not supported.
    """
    model = metadata.get(PREFIX + "model")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{PREFIX}model: expected 'gpt2' or 'llama', got {shown(model)}")
    tokens = _tokens(metadata)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        first, again = next((vocabulary[token], index) for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(
            f"{PREFIX}tokens: expected distinct tokens, got {shown(tokens[first])} with the ids {min(first, again)} and "
            f"{max(first, again)}"
        )
    types = _types(metadata, tokens)
    ids = _special_ids(metadata, len(tokens), SENTENCEPIECE_IDS if model == "llama" else {})
    if model == "gpt2":
        splitting = _splitting(metadata)
        backend, add_bos = _byte_level(metadata, vocabulary, types, splitting), splitting.add_bos
    else:
        backend, add_bos = _sentencepiece(metadata, vocabulary, types, tokens, ids.get("unknown")), True
    _add_tokens(backend, metadata, tokens, types)

    special_tokens = {name: tokens[ids[key]] for key, name in NAMED.items() if key in ids}
    config = {}
    for key, default in (("bos", add_bos), ("eos", False)):
        stated = _flag(metadata, f"add_{key}_token")
        if stated and key not in ids:
            raise ValueError(f"{PREFIX}{key}_token_id: expected an id, as add_{key}_token is true, got None")
        config[f"add_{key}_token"] = default if stated is None else stated
    add_bos_and_eos(backend, config, special_tokens)

    ends = [ids[key] for key in ("eos", "eot", "eom") if key in ids]
    ends += [index for index, kind in enumerate(types) if kind == CONTROL and tokens[index] in END_TOKENS]
    if {"<|return|>", "<|call|>"} <= vocabulary.keys() or {"<|flush|>", "<|calls|>"} <= vocabulary.keys():
        ends = [index for index in ends if tokens[index] != "<|end|>"]  # which ends a message there, not a turn
    return Tokenizer(
        backend, special_tokens=special_tokens, eos=list(dict.fromkeys(ends)), chat_template=_chat_templates(metadata)
    )


# Metadata


def _list(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], meaning: str, length: int | None = None) -> Sequence:
    """A list whose entries are of these types, of this length."""
    value = metadata.get(PREFIX + name)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{PREFIX}{name}: expected a list of {meaning}, got {shown(value)}")
    if not set(map(type, value)) <= set(kinds):
        index, entry = next((index, entry) for index, entry in enumerate(value) if type(entry) not in kinds)
        raise ValueError(f"{PREFIX}{name}: expected a list of {meaning}, got {shown(entry)} at position {index}")
    if length is not None and len(value) != length:
        raise ValueError(f"{PREFIX}{name}: expected {length} {meaning}, as many as tokens, got {len(value)}")
    return value


def _flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    value = metadata.get(PREFIX + name)
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"{PREFIX}{name}: expected a bool, got {shown(value)}")
    return value


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Tokens by id; those without a text get the text that llama.cpp gives them."""
    tokens = _list(metadata, "tokens", (str,), "texts")
    if not tokens:
        raise ValueError(f"{PREFIX}tokens: expected at least one token, got an empty list")
    _require_unicode("tokens", tokens)
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def _require_unicode(name: str, texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{PREFIX}{name}: expected characters, got {text!r} at position {index}") from error


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """The type of each token: as stated, but control for those that end a turn."""
    if PREFIX + "token_type" not in metadata:
        types = [NORMAL] * len(tokens)
    else:
        types = list(_list(metadata, "token_type", (int,), "integers", len(tokens)))
        if not set(types) <= set(TYPES):
            index = next(index for index, kind in enumerate(types) if kind not in TYPES)
            raise ValueError(f"{PREFIX}token_type: expected types from 0 to 6, got {types[index]} at position {index}")
    return [CONTROL if token in END_TOKENS else kind for token, kind in zip(tokens, types)]


def _special_ids(metadata: Mapping[str, Any], count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """The ids of special tokens, such as "bos"."""
    result = {name: index for name, index in defaults.items() if index < count}
    for name in (*NAMED, "eot", "eom"):
        value = metadata.get(f"{PREFIX}{name}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < count:
            raise ValueError(f"{PREFIX}{name}_token_id: expected an id from 0 to {count - 1}, got {shown(value)}")
        result[name] = value
    return result


def _splitting(metadata: Mapping[str, Any]) -> Splitting:
    name = metadata.get(PREFIX + "pre", "default")
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise ValueError(f"{PREFIX}pre: expected one of {', '.join(sorted(SPLITTINGS))}, got {shown(name)}")
    return SPLITTINGS[name]


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The only template, or several by name."""
    key = "tokenizer.chat_template"
    stored = {name: value for name, value in metadata.items() if name == key or name.startswith(key + ".")}
    for name, value in stored.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected a text, got {shown(value)}")
    templates = {name.removeprefix(key).removeprefix(".") or "default": value for name, value in stored.items()}
    return templates.get("default") if templates.keys() <= {"default"} else templates


# Models


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], types: Iterable[int], splitting: Splitting
) -> tokenizers.Tokenizer:
    pairs: dict[tuple[str, str], None] = {}  # of merges that are listed twice, the first counts
    for index, merge in enumerate(_list(metadata, "merges", (str,), "texts")):
        left, _, right = merge[1:].partition(" ")  # a token may begin with a space
        left = merge[:1] + left
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"{PREFIX}merges: expected two tokens that make a token, got {shown(merge)} at position {index}")
        pairs[left, right] = None
    result = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(pairs), ignore_merges=splitting.whole_words))
    steps: list[Any] = [pre_tokenizers.Split(tokenizers.Regex(e), "isolated") for e in splitting.expressions]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    result.pre_tokenizer = pre_tokenizers.Sequence(steps)
    # The characters of ordinary tokens stand for bytes, those of a user-defined token for themselves.
    written = [token for token, kind in zip(vocabulary, types) if kind == USER_DEFINED and not token.isascii()]
    as_bytes = [decoders.Replace(tokenizers.Regex(rf"\A{re.escape(token)}\z"), _in_bytes(token)) for token in written]
    result.decoder = decoders.Sequence([*as_bytes, decoders.ByteLevel()])
    return result


def _in_bytes(text: str) -> str:
    """The characters that stand for the bytes of a text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(word for word, _ in split)


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], types: Sequence[int], tokens: Sequence[str], unknown: int | None
) -> tokenizers.Tokenizer:
    scores = _list(metadata, "scores", (float, int), "numbers", len(tokens))
    if not all(map(math.isfinite, scores)):
        index = next(index for index, score in enumerate(scores) if not math.isfinite(score))
        raise ValueError(f"{PREFIX}scores: expected finite numbers, got {scores[index]} at position {index}")
    model = models.BPE(
        vocab=vocabulary, merges=_merges(vocabulary, scores, types), byte_fallback=True, fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )  # fmt: skip
    prefix = _flag(metadata, "add_space_prefix") is not False
    result = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))  # to each text between added tokens
    result.normalizer = normalizers.Sequence(steps)
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    result.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return result


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, in descending order of its score.

    llama.cpp merges the leftmost of pairs with the same score. That is no order of pairs, but nearly the same: the longer
    token first among user-defined ones, which are runs of one character, and the longer left part of one token.
    """
    ranked = sorted(
        vocabulary.items(),
        key=lambda entry: (-scores[entry[1]], -len(entry[0]) if types[entry[1]] == USER_DEFINED else 0, entry[1]),
    )
    return [
        (token[:cut], token[cut:])
        for token, _ in ranked
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _add_tokens(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], types: Iterable[int]
) -> None:
    """Has texts split at control, unknown and user-defined tokens."""
    name = metadata.get("general.name")
    is_phi3 = isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))
    added = [
        tokenizers.AddedToken(
            token, normalized=False, special=kind != USER_DEFINED,
            rstrip=is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(tokens, types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    backend.add_tokens(added)
