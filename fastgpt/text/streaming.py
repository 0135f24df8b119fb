"""Streaming text: complete characters from tokens, and truncation at stop strings."""

from collections.abc import Iterable, Sequence
from typing import Protocol

PREFIX_TOKENS = 16  # of a prompt: the text of a token may depend on those before it, such as a leading space


class Decodes(Protocol):
    """What a tokenizer must provide."""

    def decode(self, ids: Iterable[int]) -> str: ...


class IncrementalDetokenizer:
    """Decodes tokens one by one, into complete characters.

    Args:
        prompt: ids before them. Their text is not returned, but the text of the first tokens may depend on it.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        latest = max(len(prompt) - PREFIX_TOKENS, 0)
        for begin in range(latest, max(latest - 4, -1), -1):  # not in the middle of a character
            if not tokenizer.decode(prompt[begin:]).startswith("\ufffd"):
                break
        # The tokens whose text was returned last, and those since: decoded together, they read as in the whole text.
        self.window = list(prompt[begin:])
        self._mark_returned(len(self.window))

    def _mark_returned(self, count: int) -> None:
        self.returned, self.returned_text = count, self.tokenizer.decode(self.window[:count])

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # The replacement character stands for bytes that may be the beginning of a character.
        if len(text) <= len(self.returned_text) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self.returned_text) :]
        del self.window[: self.returned]
        self._mark_returned(len(self.window))
        return piece

    def finish(self) -> str:
        """The rest of the text: incomplete characters, as the tokenizer decodes them."""
        return self.tokenizer.decode(self.window)[len(self.returned_text) :]


class StopStrings:
    """Truncates a streamed text before the first complete stop string.

    Text that may be the beginning of a stop string is held back. The result does not depend on how the text is split into
    pieces. Special tokens are not text, but are matched where they are part of a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop, self.found = list(stop), False
        self.held = ""
        self.is_text: list[bool] = []  # for each character that is held back

    def push(self, piece: str, is_text: bool = True) -> str:
        """Text that is not part of a stop string; "" once a stop string is `found`. is_text: False for a special token."""
        if not self.stop or self.found:
            return piece if is_text and not self.found else ""
        if not is_text and not any(piece in stop for stop in self.stop):
            return ""
        text = self.held + piece
        self.is_text += [is_text] * len(piece)
        begins = {stop: text.find(stop) for stop in self.stop if stop in text}
        if begins:
            self.found = True
            first = min(begins, key=lambda stop: (begins[stop] + len(stop), begins[stop]))
            return self._release(text, begins[first])
        held = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
        )
        return self._release(text, len(text) - held)

    def finish(self) -> str:
        """The text that was held back and turned out not to be a stop string."""
        return "" if self.found else self._release(self.held, len(self.held))

    def _release(self, text: str, end: int) -> str:
        released = "".join(character for character, is_text in zip(text[:end], self.is_text) if is_text)
        self.held, self.is_text = text[end:], self.is_text[end:]
        return released
