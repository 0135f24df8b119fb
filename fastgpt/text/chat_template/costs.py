"""What methods and filters are charged before they run, by functions of (budget, value, *arguments). Results are charged later."""

import re
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import SecurityError
from markupsafe import Markup

from fastgpt.text.chat_template.budget import Budget
from fastgpt.text.chat_template.messages import TextParts

LARGE = 10**18  # larger than any size


def pay_for_formatting(budget: Budget, text: str, values: Any) -> None:
    """Charges for `text % values`."""
    budget.take(len(text))
    if "*" in text:
        raise SecurityError("a width of * in a format is not safe")
    budget.take(text.count("%") * (largest_number(text) + budget.weigh(values)))


def largest_number(text: str) -> int:
    """The largest number in a format, which bounds its widths and precisions. Python accepts the digits of every script, and
    leading zeros."""
    found = re.findall(r"\d+", text)
    return max((min(int(digits), LARGE) if len(digits) < 1000 else LARGE for digits in found), default=0)


def pay_for_reading(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    budget.read(value, *args, *kwargs.values())


def pay_for_comparing(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Charges steps for each entry, too, since entries are compared, or many small values are made."""
    pay_for_reading(budget, value, *args, **kwargs)
    weight, entries = budget.measure(value)[:2]
    budget.spend(weight + 10 * entries)


def pay_nothing(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """For what takes constant time."""


def pay_for_copying(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """For shallow copies."""
    budget.spend(len(value) if hasattr(value, "__len__") else 0)


def pay_for_padding(budget: Budget, value: Any, width: int = 80, *rest: Any) -> None:
    pay_for_reading(budget, value)
    budget.take(width)


def pay_for_tabs(budget: Budget, value: str, tabsize: int = 8) -> None:
    budget.take(len(value) + value.count("\t") * tabsize)


def pay_for_replacing(budget: Budget, value: Any, old: Any, new: Any, count: int | None = -1) -> None:
    value, old, new = str(value), str(old), str(new)
    pay_for_reading(budget, value)
    found = value.count(old)
    budget.take(len(value) + (found if count is None or count < 0 else min(found, count)) * len(new))


def pay_for_joining(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> None:
    pay_for_comparing(budget, value)
    budget.take(len(value) * budget.weigh(d))


def pay_for_joining_by(budget: Budget, separator: Any, values: Any) -> None:
    pay_for_joining(budget, values, separator)


def pay_for_indenting(budget: Budget, value: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> None:
    pay_for_reading(budget, value)
    lines = str(value).count("\n") + 1
    budget.take(lines * (width if isinstance(width, int) else budget.weigh(width)))


def require_small_precision(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    if not -300 <= precision <= 300:
        raise SecurityError(f"a precision of {precision} is not safe")


def pay_for_batches(budget: Budget, value: Any, count: int, fill_with: Any = None) -> None:
    pay_for_copying(budget, value)
    budget.take(count)


def pay_for_sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    pay_for_comparing(budget, value)
    if not isinstance(start, (int, float)):
        raise SecurityError("a sum of values that are not numbers is not safe")


def pay_for_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    pay_for_formatting(budget, str(value), args or kwargs)


def pay_for_json(
    budget: Budget, value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None,
    sort_keys: bool = False,
) -> None:  # fmt: skip
    pay_for_comparing(budget, value)
    width = indent if isinstance(indent, int) else budget.weigh(indent or "")
    budget.take(budget.indentation(value, max(width, budget.weigh(separators or ""))))


Cost = Callable[..., None]  # of a budget, a value, and the arguments of the method or filter
METHODS: dict[type, dict[str, Cost]] = {
    str: dict.fromkeys(
        "strip lstrip rstrip startswith endswith removeprefix removesuffix find rfind index rindex count upper lower "
        "capitalize casefold swapcase isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable "
        "isspace istitle isupper".split(), pay_for_reading,
    ) | dict.fromkeys("split rsplit splitlines partition rpartition title".split(), pay_for_comparing)
    | dict.fromkeys("center ljust rjust zfill".split(), pay_for_padding)
    | {"replace": pay_for_replacing, "join": pay_for_joining_by, "expandtabs": pay_for_tabs},
    dict: dict.fromkeys("get keys values items".split(), pay_nothing) | {"copy": pay_for_copying},
    list: {"count": pay_for_reading, "index": pay_for_reading, "copy": pay_for_copying},
    tuple: {"count": pay_for_reading, "index": pay_for_reading},
    int: {"bit_length": pay_nothing, "is_integer": pay_nothing},
    float: {"is_integer": pay_nothing},
}  # fmt: skip
METHODS |= {TextParts: METHODS[list], Markup: METHODS[str]}
FILTERS: dict[str, Cost] = (
    dict.fromkeys("attr count d default first items last length map reject rejectattr select selectattr".split(), pay_nothing)
    | dict.fromkeys("list reverse".split(), pay_for_copying)
    | dict.fromkeys("abs capitalize e escape float int lower safe string trim truncate upper".split(), pay_for_reading)
    | dict.fromkeys("dictsort groupby max min sort title unique".split(), pay_for_comparing)
    | {
        "batch": pay_for_batches,
        "center": pay_for_padding,
        "format": pay_for_format,
        "indent": pay_for_indenting,
        "join": pay_for_joining,
        "replace": pay_for_replacing,
    }
    | {"round": require_small_precision, "slice": pay_for_batches, "sum": pay_for_sum, "tojson": pay_for_json}
)
LAZY = {"map", "reject", "rejectattr", "select", "selectattr", "unique"}  # they read their input as their results are read
COMPARING = set(  # tests
    "== eq equalto != ne < lt lessthan <= le > gt greaterthan >= ge in lower upper divisibleby".split()
)
