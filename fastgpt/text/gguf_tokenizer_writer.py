"""The metadata of a GGUF file that describe a tokenizer: the opposite of `fastgpt.text.gguf_tokenizer`."""

import json
from typing import Any

import tokenizers

from fastgpt.text.gguf_tokenizer import NAMED, PREFIX, SPLITTINGS, tokenizer_from_gguf
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.text.vocabularies import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

UNUSED, BYTE = 5, 6  # further types of tokens
NEVER = -1e9  # the score of a token that no merge makes
FIRST = "gpt-2", "llama-bpe", "qwen2", "smollm"  # ways to split a text that are tried before all others
# Where ways to split differ: digits, contractions, white space, cases, punctuation, other scripts; and tokens that end a turn.
PROBES = (
    "Hello world, it's 1234567 o'clock; WE'LL see.", "  two spaces\n\n three\t\ttabs  \r\n end \n", "naïve Ünïcödé ÀÉ 東京都 안녕 नमस्ते",
    "x=3.14*(y_1-2)//5; #!/bin/sh $HOME ~~~ ... ---", "camelCaseWord ALLCAPS McDonald I'M you'Re", "🙂👍🏽 \u00a0\u2003.",
    "a", " ", "\n", "", "100 000,5 ½ ² ٣", "don't\u2019ve 'tis ''", "word\u3000word。「引用」！", "1 22 333 4444 55555",
)  # fmt: skip


def gguf_from_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata that describe a tokenizer, for `fastgpt.checkpoints.gguf_writer`: llama.cpp gives the same ids by them, as
    far as a number of texts shows that are compared here.

    Args:
        vocab_size: of the model: tokens that the tokenizer does not have are unused ones.

    Raises: ValueError for a tokenizer that is neither byte-level BPE nor SentencePiece's, or that splits texts in a way of its
        own.
    """
    described = json.loads(tokenizer.backend.to_str())
    model = described["model"]
    if model["type"] != "BPE" or tokenizer.vocab_size > vocab_size:
        got = model["type"] if model["type"] != "BPE" else f"{tokenizer.vocab_size} tokens for a model of {vocab_size}"
        raise ValueError(f"tokenizer: expected BPE, byte-level or of SentencePiece, which GGUF files can hold, got {got}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer.backend, model, vocab_size)
    metadata: dict[str, Any] = {PREFIX + "tokens": tokens, PREFIX + "token_type": types}
    metadata |= _special(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        for name, template in tokenizer.chat_template.items():
            metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    elif tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if model.get("byte_fallback"):
        first = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
        metadata |= {PREFIX + "model": "llama", PREFIX + "scores": [float(-first.get(token, -NEVER)) for token in tokens]}
        prefixed = SPACE in (tokenizer.backend.normalizer.normalize_str("a") if tokenizer.backend.normalizer else "") or any(
            SPACE in word
            for word, _ in (tokenizer.backend.pre_tokenizer.pre_tokenize_str("a") if tokenizer.backend.pre_tokenizer else ())
        )
        candidates: list[dict[str, Any]] = [{PREFIX + "add_space_prefix": prefixed}]
    else:
        metadata |= {PREFIX + "model": "gpt2", PREFIX + "merges": [" ".join(merge) for merge in merges]}
        distinct = {SPLITTINGS[name]: name for name in reversed((*FIRST, *SPLITTINGS))}
        names = [*FIRST, *(name for name in distinct.values() if name not in FIRST)]
        whole = bool(model.get("ignore_merges"))
        candidates = [{PREFIX + "pre": name} for name in sorted(names, key=lambda name: SPLITTINGS[name].whole_words != whole)]
    specials = [text for text in tokenizer.special_texts().values() if text]
    probes = [*PROBES, *(f"a{text} b" for text in specials[:20])]
    for candidate in candidates:
        if _agree(tokenizer, tokenizer_from_gguf(metadata | candidate), probes):
            return metadata | candidate
    raise ValueError(
        "tokenizer: expected one that splits texts as llama.cpp can, got one with another pre_tokenizer or normalizer"
    )


def _agree(one: Tokenizer, other: Tokenizer, probes: list[str]) -> bool:
    """Whether both give the same ids and, if they are byte-level, split into the same words."""
    words = [tokenizer.backend.pre_tokenizer for tokenizer in (one, other)]
    if all(words) and any(len({str(_words(split, text)) for split in words}) > 1 for text in probes):
        return False
    return all(one.encode(text) == other.encode(text) for text in probes)


def _words(split: Any, text: str) -> list[str]:
    return [word for word, _ in split.pre_tokenize_str(text)]


def _tokens(backend: tokenizers.Tokenizer, model: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids of the model."""
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for text, index in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[index], types[index] = text, BYTE if is_byte else NORMAL
    for index, token in backend.get_added_tokens_decoder().items():
        kind = CONTROL if token.special else USER_DEFINED
        tokens[index], types[index] = token.content, UNKNOWN if token.content == model.get("unk_token") else kind
    return tokens, types


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens are special, and whether texts begin or end with one."""
    result: dict[str, Any] = {}
    for key, name in NAMED.items():
        index = tokenizer.backend.token_to_id(tokenizer.special_tokens.get(name, ""))
        if index is not None:
            result[f"{PREFIX}{key}_token_id"] = index
    ends = [index for index in tokenizer.eos if index != result.get(f"{PREFIX}eos_token_id")]
    for key in ("eos", "eot", "eom"):
        if ends and f"{PREFIX}{key}_token_id" not in result:
            result[f"{PREFIX}{key}_token_id"] = ends.pop(0)
    around = tokenizer.encode("")
    for key in ("bos", "eos"):
        index = result.get(f"{PREFIX}{key}_token_id")
        result[f"{PREFIX}add_{key}_token"] = index is not None and index in around
    return result
