"""What a template sees: messages and variables as plain data, and where the text of the last message ends."""

import dataclasses
from collections.abc import Mapping
from typing import Any

DEPTH = 100  # of nested lists and dicts
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one entry of a message, the usual one first
END = "\ue000end of the last message\ue000 "


class ChatTemplateError(ValueError):
    """A chat template is not valid Jinja, exceeds the limits, or rejects the messages."""


class PlainData:
    """Copies the inputs of a template, and counts their characters and entries.

    The copies have Python's own types and no subclasses, whose methods the sandbox would have to know.
    """

    def __init__(self):
        self.characters = self.entries = 0

    def copy(self, name: str, value: Any, depth: int = 0) -> Any:
        """A copy of a value.

        Args:
            name: of the argument that it is in, for errors.
            depth: of lists and dicts around it.
        """
        if depth > DEPTH:
            raise ChatTemplateError(f"{name}: expected lists and dicts nested at most {DEPTH} deep")
        self.entries += 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self.characters += len(value)
            return str.__str__(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, (list, tuple)):
            copies = (self.copy(name, entry, depth + 1) for entry in value)
            return tuple(copies) if isinstance(value, tuple) else list(copies)
        if callable(getattr(value, "model_dump", None)):  # pydantic's, which chat clients have
            return self.copy(name, value.model_dump(), depth + 1)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {self.copy(name, key, depth + 1): self.copy(name, entry, depth + 1) for key, entry in value.items()}
        if getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
            return self.copy(name, value.item(), depth + 1)
        raise TypeError(f"{name}: expected strings, numbers, lists and dicts, got {type(value).__name__} among them")


class TextParts(list):
    """A content of text parts: for templates that expect parts, a list of them; where it is printed, their text."""

    def __str__(self):
        return "".join(part["text"] for part in self)

    def __add__(self, other):
        return str(self) + other if isinstance(other, str) else list(self) + other

    def __radd__(self, other):
        return other + str(self)


def prepared(message: dict) -> dict:
    """A message as templates expect it: without entries that are None, its reasoning under each of the usual names."""
    message = {name: value for name, value in message.items() if value is not None}
    for name in REASONING:
        if name in message:
            message = {"thinking": message[name]} | message | {"reasoning_content": message[name]}
            break
    content = message.get("content")
    if isinstance(content, list) and content and all(is_text_part(part) for part in content):
        message["content"] = TextParts(content)
    return message


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def mark_end(chat: list[dict]) -> None:
    """Appends END to the text of the last message."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, TextParts):
        content[-1]["text"] += END
    elif isinstance(content, str):
        chat[-1]["content"] += END
    else:
        raise ChatTemplateError("messages: expected text as the content of the last message, to continue it")


def cut_at_end(prompt: str) -> str:
    before, mark, after = prompt.rpartition(END.rstrip())
    if not mark:
        raise ChatTemplateError("messages: expected a chat template that prints the last message, to continue it")
    return before if after.startswith(" ") else before.rstrip()  # a template that trims contents would have trimmed it
