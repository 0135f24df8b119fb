"""A training text: read, hashed and tokenized piece by piece, with a few bytes of memory per character."""

import array
import codecs
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastgpt.text.tokenizer import Tokenizer

PIECE = 1 << 16  # characters that are read and tokenized at a time
OVERLAP = 1 << 12  # characters that a window shares with the previous one, initially
MIN_COMMON_TOKENS = 32  # that two windows must agree on in their overlap


def pieces(text: str | Path) -> Iterator[str]:
    """Yields a text, a string or a UTF-8 file, piece by piece.

    A file is read in text mode, so "\\r\\n" becomes "\\n"; a byte-order mark at its beginning is skipped.

    Raises: FileNotFoundError; ValueError, with the file and the offset of the byte, if it is not UTF-8; TypeError.
    """
    if isinstance(text, str):
        for begin in range(0, len(text), PIECE):
            yield text[begin : begin + PIECE]
        return
    if not isinstance(text, Path):
        raise TypeError(f"text: expected a str, or the pathlib.Path of a file, got {type(text).__name__}")
    if not text.is_file():  # a pipe would not do either: a text is read more than once
        what = "is a folder" if text.is_dir() else "is not a regular file" if text.exists() else "does not exist"
        raise FileNotFoundError(f"text: expected a file, {text} {what}")
    with text.open("rb") as file:
        utf8 = codecs.getincrementaldecoder("utf-8")()
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        while True:
            read = file.read(PIECE)
            kept = len(utf8.getstate()[0])  # bytes of an incomplete character at the end of the last piece
            try:
                piece = lines.decode(utf8.decode(read, final=not read), final=not read)
            except UnicodeDecodeError as error:
                offset = begin - kept + error.start
                raise ValueError(
                    f"text: expected UTF-8, {text} has the byte 0x{error.object[error.start]:02x} at offset {offset:,} "
                    f"({error.reason})"
                ) from error
            begin += len(read)
            if piece:
                yield piece
            if not read:
                return


class Summary(NamedTuple):
    sha256: str  # of the text in UTF-8
    characters: str  # the distinct ones, in code-point order


def summarize(text: str | Path) -> Summary:
    """Reads a text once. Raises the errors of `pieces`, and ValueError for a character that UTF-8 cannot encode."""
    digest = hashlib.sha256()
    characters: set[str] = set()
    for piece in pieces(text):
        try:
            digest.update(piece.encode())
        except UnicodeEncodeError as error:  # a str may hold lone surrogates
            raise ValueError(f"text: expected characters, got {piece[error.start]!r}, half of a surrogate pair") from error
        characters.update(piece)
    return Summary(digest.hexdigest(), "".join(sorted(characters)))


def tokenize(text: str | Path, tokenizer: Tokenizer) -> torch.Tensor:
    """The token ids (N,) of a text, equal to those of `tokenizer.encode` for the whole text: uint16 if they fit, else uint32.

    The text is encoded in overlapping windows. Two neighbors are joined in the middle of a stretch of at least 2,048 characters
    in which both have the same tokens at the same positions: then text before the stretch does not affect tokens after it, and
    vice versa. If they differ, for example because a word is longer than that, the overlap grows, in the end to the whole text.
    The ids are correct if a token depends on distant characters only through those in between, which holds for BPE, Unigram,
    WordPiece and WordLevel models with the normalizers and pre-tokenizers of the `tokenizers` library.

    Raises: the errors of `pieces` and `Tokenizer.encode`.
    """
    vocabulary = tokenizer.backend.get_vocab()
    wide = max(vocabulary.values(), default=0) >= 1 << 16
    ids = array.array("I" if wide else "H")
    try:
        for part in _characters(text, tokenizer, vocabulary) or _windows(text, tokenizer):
            ids.frombytes(np.asarray(part).astype(ids.typecode).tobytes())
    except _NotInPieces:
        ids = array.array(ids.typecode, tokenizer.encode("".join(pieces(text))))
    dtype = torch.uint32 if wide else torch.uint16
    return torch.frombuffer(ids, dtype=dtype) if ids else torch.empty(0, dtype=dtype)


def _characters(text: str | Path, tokenizer: Tokenizer, vocabulary: dict[str, int]) -> Iterator[np.ndarray] | None:
    """Ids by table lookup, if the tokenizer is one of `Tokenizer.from_corpus`."""
    plain = Tokenizer.from_corpus("".join(vocabulary)).backend
    if plain.to_str() != tokenizer.backend.to_str():
        return None
    table = np.full(0x110000, -1, dtype=np.int32)
    for character, index in vocabulary.items():
        table[ord(character)] = index

    def ids():
        for piece in pieces(text):
            found = table[np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
            if found.min() < 0:
                tokenizer.encode("".join(sorted(set(piece) - vocabulary.keys())))  # which raises
            yield found

    return ids()


class _Window:
    """A part of the text and its tokens: their ids, and where they begin and end, in characters."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.text = text
        try:
            encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        except Exception:  # Tokenizer.encode raises the error for users
            tokenizer.encode(text, special=False)
            raise
        self.ids = np.array(encoding.ids, dtype=np.int64)
        self.begins, self.ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T

    def tokens(self, begin: int, end: int) -> tuple[int, int]:
        """The range of tokens that overlap [begin, end), without the last one: (first, end) indices."""
        first = int(np.argmax(np.append(self.ends > begin, True)))
        last = int(np.argmax(np.append(self.begins >= end, True)))
        return first, max(first, last)

    def agrees(self, first: int, last: int, other: "_Window", first_of_other: int, shift: int) -> bool:
        """Whether these tokens equal those of `other`, a window that begins `shift` characters later."""
        mine, theirs = slice(first, last), slice(first_of_other, first_of_other + last - first)
        return (
            np.array_equal(self.ids[mine], other.ids[theirs])
            and np.array_equal(self.begins[mine], other.begins[theirs] + shift)
            and np.array_equal(self.ends[mine], other.ends[theirs] + shift)
        )


class _NotInPieces(Exception):
    """The text can only be tokenized as a whole."""


def _windows(text: str | Path, tokenizer: Tokenizer) -> Iterator[np.ndarray | list[int]]:
    read = pieces(text)
    window = _Window(next(read, ""), tokenizer)
    before, after = _special_tokens(tokenizer, window)
    yield before
    done = 0  # tokens of the window that have been yielded
    seam = (0, 0)  # range of its tokens by which it was joined to the previous window
    least = PIECE
    while piece := _at_least(least, read):
        overlap = min(OVERLAP, len(window.text))
        while True:
            shift = len(window.text) - overlap
            following = _Window(window.text[shift:] + piece, tokenizer)
            if shift == 0:  # it contains the window, and replaces it
                if not window.agrees(*seam, following, seam[0], 0):
                    raise _NotInPieces
                window, least = following, len(following.text)
                break
            begin, end = shift + overlap // 4, shift + 3 * overlap // 4
            (first, last), theirs = window.tokens(begin, end), following.tokens(begin - shift, end - shift)
            middle = first + (last - first) // 2
            same = last - first == theirs[1] - theirs[0] and window.agrees(first, last, following, theirs[0], shift)
            if same and last - first >= MIN_COMMON_TOKENS and middle >= done:
                yield window.ids[done:middle]
                window, seam, done, least = following, theirs, theirs[0] + middle - first, PIECE
                break
            overlap = min(4 * overlap, len(window.text))
    yield window.ids[done:]
    yield after


def _at_least(length: int, read: Iterator[str]) -> str:
    """At least `length` of the next characters, or all that are left."""
    taken, count = [], 0
    while count < length and (piece := next(read, "")):
        taken.append(piece)
        count += len(piece)
    return "".join(taken)


def _special_tokens(tokenizer: Tokenizer, window: _Window) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text."""
    whole, count = tokenizer.encode(window.text), len(window.ids)
    for before in range(len(whole) - count + 1):
        if whole[before : before + count] == window.ids.tolist():
            return whole[:before], whole[before + count :]
    raise _NotInPieces
