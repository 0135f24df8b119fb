"""The budget of a template: steps that it may take, and characters and entries of what it makes."""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastgpt.text.chat_template.messages import DEPTH, ChatTemplateError, PlainData

WORK = 1_000_000  # steps, of up to a microsecond; a chat of ten messages takes some thousands
CALLS = 100  # of macros, loops and blocks in each other
WORK_PER_CHARACTER, WORK_PER_ENTRY = 64, 500  # of messages, tools, documents, variables: what is long may take longer
SIZE, SIZE_PER_CHARACTER = 4_000_000, 16  # characters and entries of one value, and of the prompt; likewise
CHARACTERS_PER_STEP = 8  # that are copied or looked at
INTEGER_BITS = 4096
CONTAINERS = (list, tuple, dict)
ITERABLES = (range, KeysView, ValuesView, ItemsView)  # which have all their entries, but are made anew each time


class Budget:
    """What a template may still do.

    Args:
        data: what is given to it; more data, more work.
    """

    def __init__(self, data: PlainData | None = None):
        characters, entries = (data.characters, data.entries) if data else (0, 0)
        self.work = WORK + WORK_PER_CHARACTER * characters + WORK_PER_ENTRY * entries
        self.most = SIZE + SIZE_PER_CHARACTER * characters
        self.calls = 0  # that are being made
        # id of a list or dict -> (weight, entries, depth), and itself, so that its id remains its own
        self.weights: dict[int, tuple[tuple[int, int, int], Any]] = {}

    def spend(self, steps: int) -> None:
        self.work -= steps
        if self.work < 0:
            raise ChatTemplateError("chat_template: expected one that ends, this one takes too many steps")

    def take(self, size: int) -> None:
        """Pays for making something of so many characters or entries."""
        if size > self.most:
            raise ChatTemplateError(
                f"chat_template: expected one that makes at most {self.most:,} characters of these messages, got {size:,}"
            )
        self.spend(1 + size // CHARACTERS_PER_STEP)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Within it, one more call is being made."""
        self.calls += 1
        if self.calls > CALLS:
            raise ChatTemplateError(f"chat_template: expected at most {CALLS} calls in each other")
        yield
        self.calls -= 1

    def read(self, *values: Any) -> None:
        """Pays for looking at all that is in the values."""
        self.spend(1 + sum(map(self.weigh, values)) // CHARACTERS_PER_STEP)

    def weigh(self, value: Any) -> int:
        """Characters and entries of a value, with all that is in it, as often as it is in it."""
        return len(value) if isinstance(value, str) else self.measure(value)[0]

    def measure(self, value: Any) -> tuple[int, int, int]:
        """The weight, the number of entries in it and in these, and how deep they are in each other."""
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
                f"chat_template: expected one whose values have at most {self.most:,} characters and entries and are at "
                f"most {2 * DEPTH} lists deep, got {weight:,} and {depth}"
            )
        self.weights[id(value)] = (weight, entries, depth), value
        return weight, entries, depth

    def checked(self, value: Any) -> Any:
        """The value, which was made, paid for."""
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise ChatTemplateError(
                f"chat_template: expected one whose integers have at most {INTEGER_BITS} bits, got {value.bit_length():,}"
            )
        elif isinstance(value, CONTAINERS):
            self.take(self.weigh(value))
        return value

    def indentation(self, value: Any, width: int) -> int:
        """A bound on the spaces that a value has as indented JSON."""
        _, entries, depth = self.measure(value)
        return 2 * entries * depth * width


BUDGET: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(budget: Budget) -> Iterator[None]:
    """Within it, what runs in the sandbox is paid from this budget."""
    token = BUDGET.set(budget)
    try:
        yield
    finally:
        BUDGET.reset(token)
