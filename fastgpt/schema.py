"""Schemas: what each entry of a JSON file or field of a configuration may be, declared once, and JSON that is read strictly."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.checks import require_choice, require_flag, require_integer, require_number, shown

LARGEST_FILE = 64 << 20  # bytes of JSON that are read: the index of a model of a thousand files has less than one megabyte
SHOWN = 300  # characters of an error about a value, which may be long, as may be what was expected


class _Absent:
    """What is not there, as it appears in errors."""

    def __repr__(self) -> str:
        return "nothing"


REQUIRED, OMITTED = _Absent(), _Absent()


@dataclass(frozen=True)
class Field:
    """An entry.

    check: (name, value) -> the value, or TypeError or ValueError that begins with the name.
    default: its value where it is missing; REQUIRED: it must not be; OMITTED: it is missing from what is read, too.
    """

    check: Callable[[str, Any], Any]
    default: Any = REQUIRED


def integer(least: int, most: int, default: Any = REQUIRED, *, optional: bool = False) -> Field:
    return Field(lambda name, value: require_integer(name, value, least, most, optional), default)


def number(default: Any = REQUIRED, *, optional: bool = False, **bounds) -> Field:
    """bounds: least, most, above, below."""
    return Field(lambda name, value: require_number(name, value, **bounds, optional=optional), default)


def flag(default: Any = REQUIRED) -> Field:
    def check(name, value):
        require_flag(name, value)
        return value

    return Field(check, default)


def choice(choices: Iterable, default: Any = REQUIRED) -> Field:
    choices = tuple(choices)

    def check(name, value):
        require_choice(name, value, choices)
        return value

    return Field(check, default)


def text(default: Any = REQUIRED, *, optional: bool = False) -> Field:
    def check(name, value):
        if not isinstance(value, str) and not (optional and value is None):
            raise TypeError(f"{name}: expected a string{' or null' if optional else ''}, got {shown(value)}")
        return value

    return Field(check, default)


def several(entry: Field, default: Any = REQUIRED, *, optional: bool = False, or_one: bool = False) -> Field:
    """A list of entries, as a tuple; or_one: or one entry, as a tuple of it."""

    def check(name, value):
        if optional and value is None:
            return None
        if isinstance(value, (list, tuple)):
            return tuple(entry.check(f"{name}[{i}]", x) for i, x in enumerate(value))
        if not or_one:
            raise TypeError(f"{name}: expected a list{' or None' if optional else ''}, got {shown(value)}")
        return (entry.check(name, value),)

    return Field(check, default)


def mapping(default: Any = REQUIRED, *, optional: bool = False) -> Field:
    """A JSON object, whose entries are checked elsewhere."""

    def check(name, value):
        if not isinstance(value, dict) and not (optional and value is None):
            raise TypeError(f"{name}: expected a JSON object{' or null' if optional else ''}, got {shown(value)}")
        return value

    return Field(check, default)


def only(expected: Any, default: Any = REQUIRED) -> Field:
    def check(name, value):
        if type(value) is not type(expected) or value != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {shown(value)}")
        return value

    return Field(check, default)


def unsupported(*neutral) -> Field:
    """What would change a model's results and is not supported: only None, False and the neutral values are accepted."""

    def check(name, value):
        if not any(value is x or (type(value) is type(x) and value == x) for x in (None, False, *neutral)):
            raise ValueError(f"{name}: expected null or no such entry, since it is not supported, got {shown(value)}")
        return value

    return Field(check, None)


def read(fields: Mapping[str, Field], values: Mapping, prefix: str = "", *, closed: bool = False) -> dict:
    """Every declared entry of a JSON object, checked, or its default.

    Args:
        prefix: what names in errors begin with.
        closed: entries that are not declared are errors; default: they are ignored.

    Raises: ValueError that begins with the entry's name.
    """
    result = {}
    try:
        for name, field in fields.items():
            value = values.get(name, field.default)
            if value is not OMITTED:
                result[name] = value if name not in values and value is not REQUIRED else field.check(prefix + name, value)
        for name in values if closed else ():
            if name not in fields:
                raise ValueError(f"{prefix}{name}: expected one of the entries {', '.join(fields)}")
    except (TypeError, ValueError) as error:
        message = str(error)
        shown = message if len(message) <= SHOWN else f"{message[: SHOWN // 2]} ... {message[-SHOWN // 2 :]}"
        raise ValueError(shown) from None
    return result


def check_fields(instance: Any, fields: Mapping[str, Field], prefix: str = "") -> None:
    """Checks the fields of a frozen dataclass, which become what their checks return."""
    for name, field in fields.items():
        object.__setattr__(instance, name, field.check(prefix + name, getattr(instance, name)))


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object in a file, or the list if that is the kind.

    Raises: ValueError that begins with the path, see `parse_json`; OSError that names it where it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path}: expected at most {LARGEST_FILE >> 20} MB of JSON, got {size >> 20} MB")
    return parse_json(path.read_bytes(), path, kind)


def parse_json(data: bytes, source: str | Path, kind: type = dict) -> Any:
    """A JSON object, or a list if that is the kind. Stricter than the json module: in UTF-8, every key once, every number finite.

    Raises: ValueError that begins with the source and says what is wrong.
    """
    expected = "a JSON object" if kind is dict else "a JSON list"
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_int=_integer)
        if not isinstance(value, kind):
            raise ValueError(f"got a {type(value).__name__}")
        _require_finite(value)
    except _BadEntry as error:
        raise ValueError(f"{source}: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is damaged: expected {expected} (got one nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{source} is damaged: expected {expected} ({error})") from None
    return value


class _BadEntry(Exception):
    """Names an entry of an object, and what is wrong with it."""


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    result = {}
    for key, value in pairs:
        if key in result:
            raise _BadEntry(f"{key}: expected one entry of this name, got two")
        result[key] = value
    return result


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else math.inf  # larger than any float: found by its name below


def _require_finite(value, name: str = "") -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _BadEntry(f"{name}: expected a finite number, got {value}")
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_finite(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _require_finite(entry, f"{name}[{i}]")
