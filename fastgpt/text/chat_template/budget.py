"""The budget of a template: steps that it may take, and characters and entries of what it makes."""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastgpt.text.chat_template.messages import DEPTH, ChatTemplateError, PlainData

WORK = 1_000_000  # steps, of up to a microsecond; a chat of ten messages takes some thousands
CALLS = 100  # nested, of macros, loops and blocks
WORK_PER_CHARACTER, WORK_PER_ENTRY = 64, 500  # of messages, tools, documents, variables: long inputs may take longer
SIZE, SIZE_PER_CHARACTER = 4_000_000, 16  # characters and entries of one value, and of the prompt; likewise
CHARACTERS_PER_STEP = 8  # copied or read
INTEGER_BITS = 4096
CONTAINERS = (list, tuple, dict)
ITERABLES = (range, KeysView, ValuesView, ItemsView)  # which are made anew each time, so their ids are not kept


class Budget:
    """The steps and sizes that a template has left.

    Args:
        data: the template's inputs; more data allows more work.
    """

    def __init__(self, data: PlainData | None = None):
        characters, entries = (data.characters, data.entries) if data else (0, 0)
        self.work = WORK + WORK_PER_CHARACTER * characters + WORK_PER_ENTRY * entries
        self.most = SIZE + SIZE_PER_CHARACTER * characters
        self.calls = 0  # in progress
        # id of a list or dict -> (weight, entries, depth), and itself, so that its id remains its own
        self.weights: dict[int, tuple[tuple[int, int, int], Any]] = {}

    def spend(self, steps: int) -> None:
        self.work -= steps
        if self.work < 0:
            raise ChatTemplateError("chat_template: expected one within the limit of steps, this one takes too many")

    def take(self, size: int) -> None:
        """Charges for making a value of so many characters or entries."""
        if size > self.most:
            raise ChatTemplateError(
                f"chat_template: expected at most {self.most:,} characters made from these messages, got {size:,}"
            )
        self.spend(1 + size // CHARACTERS_PER_STEP)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A context manager around a call, which may be nested in others."""
        self.calls += 1
        if self.calls > CALLS:
            raise ChatTemplateError(f"chat_template: expected at most {CALLS} nested calls")
        yield
        self.calls -= 1

    def read(self, *values: Any) -> None:
        """Charges for reading all of the values."""
        self.spend(1 + sum(map(self.weigh, values)) // CHARACTERS_PER_STEP)

    def weigh(self, value: Any) -> int:
        """Characters and entries of a value and of all values nested in it, each as often as it occurs."""
        return len(value) if isinstance(value, str) else self.measure(value)[0]

    def measure(self, value: Any) -> tuple[int, int, int]:
        """The weight of a value, the number of entries at all levels, and their depth."""
        if isinstance(value, str):
            return len(value), 1, 0
        if isinstance(value, ITERABLES):
            value = list(value)
        elif not isinstance(value, CONTAINERS):
            return 1, 1, 0
        if (known := self.weights.get(id(value))) is not None:
            return known[0]
        self.spend(2 * len(value))
        parts = [self.measure(entry) for entry in value]
        if isinstance(value, dict):
            parts += [self.measure(entry) for entry in value.values()]
        weight, entries = (1 + sum(part[i] for part in parts) for i in range(2))
        depth = 1 + max((part[2] for part in parts), default=0)
        if weight > self.most or depth > 2 * DEPTH:
            raise ChatTemplateError(
                f"chat_template: expected values of at most {self.most:,} characters and entries, nested at most "
                f"{2 * DEPTH} deep, got {weight:,} and {depth}"
            )
        self.weights[id(value)] = (weight, entries, depth), value
        return weight, entries, depth

    def checked(self, value: Any) -> Any:
        """Charges for a value that was made; returns it."""
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise ChatTemplateError(
                f"chat_template: expected integers of at most {INTEGER_BITS} bits, got {value.bit_length():,}"
            )
        elif isinstance(value, CONTAINERS):
            self.take(self.weigh(value))
        return value

    def indentation(self, value: Any, width: int) -> int:
        """An upper bound on the indentation of a value as JSON, in characters."""
        _, entries, depth = self.measure(value)
        return 2 * entries * depth * width


BUDGET: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(budget: Budget) -> Iterator[None]:
    """A context manager: what runs in the sandbox is charged to this budget."""
    token = BUDGET.set(budget)
    try:
        yield
    finally:
        BUDGET.reset(token)
