"""Text that comes piece by piece: whole characters out of tokens, and the end at a stop string."""

from collections.abc import Iterable, Sequence
from typing import Protocol

CONTEXT = 16  # tokens of a prompt that decide how the next ones read: with a space before them, say


class Decodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Iterable[int]) -> str: ...


class IncrementalDetokenizer:
    """The text of tokens that come one by one, in whole characters.

    Args:
        prompt: ids before them, whose text is not given but may decide about the text of the first.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        latest = max(len(prompt) - CONTEXT, 0)
        for begin in range(latest, max(latest - 4, -1), -1):  # not amidst a character
            if not tokenizer.decode(prompt[begin:]).startswith("\ufffd"):
                break
        # What was given last, and then the tokens since: together they read as they do in the whole.
        self.window = list(prompt[begin:])
        self._begin_at(len(self.window))

    def _begin_at(self, given: int) -> None:
        self.given, self.given_text = given, self.tokenizer.decode(self.window[:given])

    def push(self, token: int) -> str:
        """The characters that are whole with this token."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # The replacement character stands for bytes that may be the beginning of a character.
        if len(text) <= len(self.given_text) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self.given_text) :]
        del self.window[: self.given]
        self._begin_at(len(self.window))
        return piece

    def finish(self) -> str:
        """What is left: characters that stayed incomplete, as the tokenizer decodes them."""
        return self.tokenizer.decode(self.window)[len(self.given_text) :]


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string that is complete in it.

    What may be the beginning of a stop string is held back. The cut is the same whatever the pieces. Special tokens, which are
    no text, count as part of it where they are a part of a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop, self.found = list(stop), False
        self.held = ""
        self.is_text: list[bool] = []  # of each character that is held

    def push(self, piece: str, is_text: bool = True) -> str:
        """The text that is certain; nothing more once a stop string is `found`. is_text: False for a special token."""
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
        """What was held back and is no stop string after all."""
        return "" if self.found else self._release(self.held, len(self.held))

    def _release(self, text: str, end: int) -> str:
        released = "".join(character for character, is_text in zip(text[:end], self.is_text) if is_text)
        self.held, self.is_text = text[end:], self.is_text[end:]
        return released
