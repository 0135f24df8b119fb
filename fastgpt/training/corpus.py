"""A text to train on: read, looked through and tokenized in pieces, within a few bytes of memory for each character."""

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

PIECE = 1 << 16  # characters that are read, and tokenized, at a time
OVERLAP = 1 << 12  # characters that a window shares with the one before, to begin with
LEAST_ALIKE = 32  # tokens that both have there


def pieces(text: str | Path) -> Iterator[str]:
    """The text, piece by piece: a string, or a file in UTF-8.

    A file is read as Python's `open` does, so "\\r\\n" comes as "\\n"; a byte-order mark at its beginning is left out.

    Raises: FileNotFoundError; ValueError, with the file and the offset of the byte, where it is not UTF-8; TypeError.
    """
    if isinstance(text, str):
        for begin in range(0, len(text), PIECE):
            yield text[begin : begin + PIECE]
        return
    if not isinstance(text, Path):
        raise TypeError(f"text: expected a str, or the pathlib.Path of a file, got {type(text).__name__}")
    if not text.is_file():  # a pipe is none either: a text is read more than once
        what = "is a folder" if text.is_dir() else "is not a regular file" if text.exists() else "does not exist"
        raise FileNotFoundError(f"text: expected a file, {text} {what}")
    with text.open("rb") as file:
        utf8 = codecs.getincrementaldecoder("utf-8")()
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        while True:
            read = file.read(PIECE)
            kept = len(utf8.getstate()[0])  # bytes of a character that the last piece began
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
    """What one look through a text tells. Raises as `pieces` does, and ValueError where a character has no UTF-8."""
    digest = hashlib.sha256()
    characters: set[str] = set()
    for piece in pieces(text):
        try:
            digest.update(piece.encode())
        except UnicodeEncodeError as error:  # a string may hold halves of surrogate pairs
            raise ValueError(f"text: expected characters, got {piece[error.start]!r}, half of a surrogate pair") from error
        characters.update(piece)
    return Summary(digest.hexdigest(), "".join(sorted(characters)))


def tokenize(text: str | Path, tokenizer: Tokenizer) -> torch.Tensor:
    """The token ids (N,) of a text, as `tokenizer.encode` gives them for the whole, in uint16 or else uint32.

    The text is encoded in windows that overlap. Two neighbors go together in the middle of a stretch of both, of at least
    2,048 characters, where they have the very same tokens at the same places: so what is before a window has no effect after
    the stretch, nor what is after a window before it. Where they differ, because a word is longer than that, say, the overlap
    grows, in the end to the whole text. Thus the ids are those of the whole as long as a token depends on characters far
    away only if those between show it, which is so for BPE, Unigram, WordPiece and WordLevel models with the normalizers
    and pre-tokenizers of the `tokenizers` library.

    Raises: as `pieces` and `Tokenizer.encode` do.
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
    """Ids by a table, if the tokenizer is one of `Tokenizer.from_corpus`."""
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
    """A stretch of the text and its tokens: ids, and where each begins and ends, in characters."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.text = text
        try:
            encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        except Exception:  # which Tokenizer.encode explains
            tokenizer.encode(text, special=False)
            raise
        self.ids = np.array(encoding.ids, dtype=np.int64)
        self.begins, self.ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T

    def tokens(self, begin: int, end: int) -> tuple[int, int]:
        """The first and the last but one of the tokens that reach into [begin, end), by index."""
        first = int(np.argmax(np.append(self.ends > begin, True)))
        last = int(np.argmax(np.append(self.begins >= end, True)))
        return first, max(first, last)

    def agrees(self, first: int, last: int, other: "_Window", first_of_other: int, shift: int) -> bool:
        """Whether these tokens are the other's, which begins `shift` characters later."""
        mine, theirs = slice(first, last), slice(first_of_other, first_of_other + last - first)
        return (
            np.array_equal(self.ids[mine], other.ids[theirs])
            and np.array_equal(self.begins[mine], other.begins[theirs] + shift)
            and np.array_equal(self.ends[mine], other.ends[theirs] + shift)
        )


class _NotInPieces(Exception):
    """This text can only be tokenized as a whole."""


def _windows(text: str | Path, tokenizer: Tokenizer) -> Iterator[np.ndarray | list[int]]:
    read = pieces(text)
    window = _Window(next(read, ""), tokenizer)
    before, after = _special_tokens(tokenizer, window)
    yield before
    done = 0  # tokens of the window that have been given
    seam = (0, 0)  # those of its tokens by which it was joined to the one before
    least = PIECE
    while piece := _at_least(least, read):
        overlap = min(OVERLAP, len(window.text))
        while True:
            shift = len(window.text) - overlap
            following = _Window(window.text[shift:] + piece, tokenizer)
            if shift == 0:  # it holds all of the window, and replaces it
                if not window.agrees(*seam, following, seam[0], 0):
                    raise _NotInPieces
                window, least = following, len(following.text)
                break
            begin, end = shift + overlap // 4, shift + 3 * overlap // 4
            (first, last), theirs = window.tokens(begin, end), following.tokens(begin - shift, end - shift)
            middle = first + (last - first) // 2
            same = last - first == theirs[1] - theirs[0] and window.agrees(first, last, following, theirs[0], shift)
            if same and last - first >= LEAST_ALIKE and middle >= done:
                yield window.ids[done:middle]
                window, seam, done, least = following, theirs, theirs[0] + middle - first, PIECE
                break
            overlap = min(4 * overlap, len(window.text))
    yield window.ids[done:]
    yield after


def _at_least(length: int, read: Iterator[str]) -> str:
    """So many of the next characters, or all that are left."""
    taken, count = [], 0
    while count < length and (piece := next(read, "")):
        taken.append(piece)
        count += len(piece)
    return "".join(taken)


def _special_tokens(tokenizer: Tokenizer, window: _Window) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    whole, count = tokenizer.encode(window.text), len(window.ids)
    for before in range(len(whole) - count + 1):
        if whole[before : before + count] == window.ids.tolist():
            return whole[:before], whole[before + count :]
    raise _NotInPieces
