"""Text to token ids and back: one wrapper around the `tokenizers` library, for character-level and any other model."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers


class Tokenizer:
    """Encodes text to token ids and decodes them, as a `tokenizer.json` describes."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend

    @classmethod
    def from_corpus(cls, text: str) -> "Tokenizer":
        """A character-level tokenizer: one token for each distinct character of `text`, in code-point order."""
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`. Raises FileNotFoundError, or ValueError when the file is damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: expected the file {path}, which does not exist")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {path} is damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the characters that the vocabulary lacks."""
        try:
            return self.backend.encode(text).ids
        except Exception as error:  # a word-level model without an unknown token raises plain Exception
            unknown = sorted(set(text) - self.backend.get_vocab().keys())
            if not unknown:
                raise
            named = ", ".join(repr(character) for character in unknown[:8])
            raise ValueError(
                f"text: expected only the {self.vocab_size} characters that the model was trained on, "
                f"got {named}{' and more' if len(unknown) > 8 else ''}"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int]):
        """Yields text as ids come, each piece as soon as it is whole characters."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for token in ids:
            piece = stream.step(self.backend, token)
            if piece:
                yield piece
