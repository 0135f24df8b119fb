"""Tokenizers in older formats than `tokenizer.json`: `vocab.json` with `merges.txt`, SentencePiece's `tokenizer.model`, and BERT's
`vocab.txt`.

Each is converted to a tokenizer of the `tokenizers` library, so that everything else, including saving, works the same way.
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastgpt import folders

SPACE = "▁"  # SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of its pieces
UNIGRAM, BPE = 1, 2  # types of its models
# How a text is split before its bytes are merged, by tokenizer_class in tokenizer_config.json.
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer", "PreTrainedTokenizer", "TokenizersBackend", None)
QWEN2_CLASSES = ("Qwen2Tokenizer",)
END_OF_TEXT = "<|endoftext|>"  # the default special token of these classes
WORDPIECE_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}  # BERT's


def find(folder: Path, name: str | Path) -> Path | None:
    """The file of this name in a tokenizer's folder, or None. Raises ValueError for a link out of the folder."""
    return folders.find(folder, name, "tokenizer")


def read_json(folder: Path, name: str) -> dict:
    """The JSON object in a file, {} if it does not exist. Raises ValueError if it is damaged or a link out of the folder."""
    path = find(folder, name)
    if path is None:
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer: {path} is damaged: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"tokenizer: {path} is damaged: expected a JSON object, got a {type(result).__name__}")
    return result


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is damaged: expected text in UTF-8: {error}") from error


def byte_level(folder: Path, config: dict) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Reads `vocab.json` and `merges.txt`: byte-level BPE of GPT-2 or Qwen2, and its default special tokens.

    Args:
        config: tokenizer_config.json; tokenizer_class and add_prefix_space are used.

    Raises: ValueError, which names the damaged file or the unsupported tokenizer_class.
    """
    name = config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else name
    if name not in (*GPT2_CLASSES, *QWEN2_CLASSES):
        known = ", ".join(str(known) for known in (*GPT2_CLASSES, *QWEN2_CLASSES) if known)
        raise ValueError(
            f"tokenizer: {folder}: expected a tokenizer.json, or a tokenizer_class of {known} to read vocab.json and "
            f"merges.txt, got {name!r}"
        )
    path = folder / "vocab.json"
    vocabulary = read_json(folder, path.name)
    ids = list(vocabulary.values())
    if not all(type(index) is int and 0 <= index < 2**31 for index in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"tokenizer: {path} is damaged: expected a distinct id for each token")
    path = find(folder, "merges.txt") or folder / "merges.txt"
    lines = [line.rstrip("\r") for line in read_text(path).split("\n")]  # only line feeds separate lines
    if lines[0].startswith("#version"):
        del lines[0]
    merges: list[Any] = [tuple(line.split(" ")) for line in lines if line]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"tokenizer: {path} is damaged: expected two tokens of vocab.json that make one, got {pair!r}")
    result = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    prefix = bool(config.get("add_prefix_space"))
    if name in QWEN2_CLASSES:
        words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        result.normalizer, result.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([words, bytes_])
    else:
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    result.decoder = decoders.ByteLevel()
    names = ("eos_token", "unk_token") if name in QWEN2_CLASSES else ("bos_token", "eos_token", "unk_token")
    return result, dict.fromkeys(names, END_OF_TEXT) if END_OF_TEXT in vocabulary else {}


def sentencepiece(path: Path, config: dict) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Reads a BPE or unigram model of SentencePiece, and its special tokens.

    Args:
        config: tokenizer_config.json. Unless its `legacy` is false, a space is added not only at the beginning of a text but
            also after each special token.

    Raises: ValueError if a library is missing, or the file is damaged or of an unsupported type.
    """
    content = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        raise ValueError(
            f"tokenizer: {path} is in tiktoken's format: expected SentencePiece's, or a tokenizer.json, which transformers "
            f"makes of it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception as error:  # a TypeError if their versions are incompatible
        found = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"tokenizer: expected the libraries sentencepiece and protobuf, which read {path}, got {found}: "
            "pip install sentencepiece protobuf"
        ) from error
    try:
        model = ModelProto.FromString(content)
        pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    except Exception as error:  # protobuf's DecodeError, which is not a ValueError
        raise ValueError(f"tokenizer: {path} is damaged: {error}") from error
    trainer, spec = model.trainer_spec, model.normalizer_spec
    if not pieces or len(pieces) < len(model.pieces):
        raise ValueError(f"tokenizer: {path} is damaged: expected distinct pieces, got {len(pieces)} in {len(model.pieces)}")
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        raise ValueError(f"tokenizer: {path}: expected a unigram or BPE model, with spaces before words")
    unknown = next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None)
    if trainer.model_type == UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
        unknown_id = pieces.get(unknown)
        model_of_pieces: models.Model = models.Unigram(vocab=vocabulary, unk_id=unknown_id, byte_fallback=trainer.byte_fallback)
    else:
        model_of_pieces = models.BPE(
            vocab=pieces, merges=_merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    result = tokenizers.Tokenizer(model_of_pieces)

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:  # only spaces
        steps.append(normalizers.Replace(tokenizers.Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    legacy = config.get("legacy") is not False
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    result.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix and not legacy:
        result.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    result.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", int(spec.add_dummy_prefix), 0),
        ]
    )

    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    result.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    result.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in user_defined])
    named = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return result, {name: model.pieces[index].piece for name, index in named.items() if 0 <= index < len(model.pieces)}


def wordpiece(path: Path, config: dict) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Reads a vocabulary of WordPiece, a token on each line, as BERT uses it, and its default special tokens.

    Args:
        config: tokenizer_config.json; do_lower_case, strip_accents, tokenize_chinese_chars and special tokens are used.

    Raises: ValueError, which names the damaged file.
    """
    words = [line.rstrip("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    vocabulary = {word: index for index, word in enumerate(words)}
    if len(vocabulary) < len(words):
        raise ValueError(f"tokenizer: {path} is damaged: expected distinct tokens, got {len(vocabulary)} in {len(words)} lines")
    named = {name: config[name] if isinstance(config.get(name), str) else token for name, token in WORDPIECE_TOKENS.items()}
    unknown, first, last = (named[f"{name}_token"] for name in ("unk", "cls", "sep"))
    for token in (unknown, first, last):
        if token not in vocabulary:
            raise ValueError(f"tokenizer: {path} is damaged: expected the token {token} on one of its lines")
    result = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown))
    strip_accents = config.get("strip_accents")
    result.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case") is not False,
        strip_accents=strip_accents if isinstance(strip_accents, bool) else None,
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
    )
    result.pre_tokenizer, result.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    result.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last], pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys((first, last))],
    )  # fmt: skip
    return result, {name: token for name, token in named.items() if token in vocabulary}


def _merges(model) -> list[tuple[str, str]]:
    """Pairs of normal pieces whose concatenation is a normal piece, in descending order of its score."""
    normal = {piece.piece: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.type == NORMAL}
    pairs = [
        (rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, left, right in sorted(pairs)]


def add_bos_and_eos(backend: tokenizers.Tokenizer, config: dict, special_tokens: dict[str, str]) -> None:
    """Has texts encoded with a bos or eos token if add_bos_token or add_eos_token of tokenizer_config.json is true."""
    names = [special_tokens.get(name) if config.get(f"add_{name}") is True else None for name in ("bos_token", "eos_token")]
    ids = {name: backend.token_to_id(name) for name in names if name is not None}
    names = [name if name is not None and ids[name] is not None else None for name in names]
    if any(names):
        # A list, since a name in a template of one string would be cut at its spaces.
        around = [[name] if name else [] for name in names]
        backend.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A", *around[1]], special_tokens=[(name, ids[name]) for name in dict.fromkeys(names) if name]
        )
