"""Input checks. Each error begins with the argument's name and says what was expected and what was passed: TypeError for a
wrong type or dtype, ValueError for a wrong shape, layout, device or range."""

import contextlib
import errno
import operator
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch._C import _is_any_autocast_enabled as _any_autocast_enabled  # a tenth of the time of the check for one device

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers under torch.compile and torch.export

MOST_SHOWN = 200  # characters of a value in an error

PENALTY: dict[str, Any] = {"least": 1e-100, "most": 1e100}  # bounds of a repetition penalty


def require_tensor(name: str, value: Any, ndim: int | None = None) -> None:
    """Raises unless value is a strided tensor (not nested or sparse) inside its storage, with ndim dimensions if given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {got}")
    if not torch.compiler.is_compiling() and not _is_within_storage(value):
        raise ValueError(f"{name}: expected a tensor inside its storage, got a storage that was resized")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")


def _is_within_storage(x: torch.Tensor) -> bool:
    try:
        size = x.untyped_storage().nbytes()
    except RuntimeError:  # a wrapper, such as those of torch.func, has no storage
        return True
    if x.is_contiguous():  # the common case, in half the time
        return (x.storage_offset() + x.numel()) * x.element_size() <= size or x.numel() == 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return 0 in x.shape or (x.storage_offset() + last + 1) * x.element_size() <= size


def require_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {expected} {meaning}, got {tuple(value.shape)}")


def require_dtype(name: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {value.dtype}")


def require_dtype_of(name: str, value: torch.Tensor, x: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises unless value has the dtype of x or, under autocast, which converts it, any of `allowed`."""
    require_dtype(name, value, allowed if is_autocasting(x.device) else (x.dtype,))


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor is one of FakeTensorMode: it has a device, but no data."""
    module = sys.modules.get("torch._subclasses.fake_tensor")  # which a program without any need not load
    return module is not None and isinstance(x, module.FakeTensor)


def is_autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for devices without autocast, for which PyTorch's check raises."""
    if not _any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def require_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def require_last_dim_contiguous(name: str, value: torch.Tensor) -> None:
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got strides {value.stride()}")


def require_no_overlap(name: str, value: torch.Tensor) -> None:
    """Raises if elements of a tensor that is written may overlap: each stride must exceed the extent of the smaller ones."""
    extent = 0
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape) if size > 1):
        if stride <= extent and value.numel():
            raise ValueError(f"{name}: expected numbers that share no memory with each other, got strides {value.stride()}")
        extent += (size - 1) * stride


def require_broadcastable(name: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if value.dim() > len(shape) or any(size not in (1, n) for size, n in zip(sizes, shape)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape} {meaning}, got {tuple(value.shape)}")


def require_choice(name: str, value: Any, choices: Collection) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def require_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")


@overload
def require_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, optional: Literal[False] = False
) -> int: ...
@overload
def require_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, optional: bool = False
) -> int | None: ...
def require_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, optional: bool = False
) -> int | None:
    """The value as an int. NumPy integers are accepted, bools and floats are not; None if optional."""
    if optional and value is None:
        return None
    expected = "an integer" + _bounds(least, most) + (" or None" if optional else "")
    if not isinstance(value, SYMBOLS):
        try:
            if isinstance(value, (bool, torch.Tensor)):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected {expected}, got {shown(value)}") from None
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return value


@overload
def require_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, optional: Literal[False] = False,
) -> float: ...  # fmt: skip
@overload
def require_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, optional: bool = False,
) -> float | None: ...  # fmt: skip
def require_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, optional: bool = False,
) -> float | None:  # fmt: skip
    """The value as a finite int or float; bools and tensors are not accepted. least and most are inclusive, above and below not."""
    if optional and value is None:
        return None
    expected = "a finite number" + _bounds(least, most, above, below) + (" or None" if optional else "")
    if isinstance(value, SYMBOLS):
        return value  # type: ignore[return-value]  # stands for a number under torch.compile
    number = None
    if not isinstance(value, (bool, str, bytes, bytearray, torch.Tensor)):
        for convert in operator.index, float:
            try:
                number = convert(value)
                break
            except TypeError:
                pass
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
    value = number
    outside = (
        (least is not None and value < least) or (most is not None and value > most)
        or (above is not None and value <= above) or (below is not None and value >= below)
    )  # fmt: skip
    if outside or not -sys.float_info.max <= value <= sys.float_info.max:  # an int may exceed the largest float
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return value if isinstance(value, float) or -(2**63) <= value < 2**63 else float(value)  # PyTorch takes no larger ints


def listed(value: Any) -> Any:
    """An iterator, such as a generator, as a list of what it yields; any other value unchanged."""
    return list(value) if isinstance(value, Iterator) else value


def make_list(name: str, value: Any) -> str:
    """The end of an error about what should have been a list: how to make one of it, if it can be."""
    if hasattr(value, "tolist"):  # an array of NumPy, a column of a data frame
        return f": pass {name}.tolist()"
    return f": pass list({name})" if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Sequence)) else ""


def require_path(name: str, value: Any) -> Path:
    """The value as a Path. Empty paths (the current directory) and paths that no file can have raise ValueError."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}: expected a path, got {shown(value)}")
    if not os.fspath(value):
        raise ValueError(f"{name}: expected a path, got an empty string")
    try:
        is_possible = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # a lone surrogate
        is_possible = False
    if not is_possible:
        raise ValueError(f"{name}: expected a path, got {shown(os.fspath(value))}, which no file can have")
    return Path(value)


def from_torchrun(name: str) -> int | None:
    """A number that torchrun tells its processes in an environment variable, like RANK; None without torchrun."""
    text = os.environ.get(name)
    if text is not None and not re.fullmatch("[0-9]+", text):
        raise ValueError(f"{name}: expected an integer >= 0 in this environment variable of torchrun, got {shown(text)}")
    return None if text is None else int(text)


@contextlib.contextmanager
def writing(name: str, path: Path, kind: str) -> Iterator[None]:
    """A context manager that turns exceptions of writing into an OSError that begins with the argument's name.

    Args:
        name: the argument.
        path: where is written.
        kind: what was expected, such as "a folder".
    """
    try:
        yield
    except (MemoryError, TypeError, ValueError):
        raise
    except Exception as error:  # libraries have their own exceptions for a full disk or missing permissions
        raise write_error(name, path, f"expected {kind} that can be written to, got {path}", error) from error


def write_error(name: str, path: Path, problem: str, error: Exception) -> OSError:
    """What to raise after a failed write: `problem` and the reason, or that the disk is full.

    Args:
        name: the argument, with which the message begins.
    """
    reason = reason_of(error)
    for full in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
        if full in reason:  # which may be a library's sentence around it
            return OSError(f"{name}: {full} for {path}")
    return OSError(f"{name}: {problem}: {reason}")


def reason_of(error: Exception) -> str:
    """The message of the system or a library about a failed write, also from an error of `writing`."""
    while isinstance(error, OSError) and error.errno is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    replaced = getattr(error, "filename2", None)  # the target of a failed rename
    return f"{reason} ({os.path.basename(replaced)})" if replaced else reason


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; False for None, which sys.stdout is without a console."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # not a file, or closed
        return False


def argument_error(error: Exception) -> Exception:
    """An exception of a compiled operation, as a ValueError if its message begins with an argument's name, else unchanged."""
    message = str(error).partition("\n")[0]
    return ValueError(message) if re.match(r"[a-z_]+: (un)?expected ", message) else error


def shown(value: Any) -> str:
    """A value as an error shows it, in one line and not at length: of a tensor its shape, of a module its class."""
    if isinstance(value, torch.Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # an integer with too many digits
        return f"{type(value).__name__} too long to show"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _bounds(least=None, most=None, above=None, below=None) -> str:
    bounds = (">=", least), ("<=", most), (">", above), ("<", below)
    return " and".join(f" {sign} {bound}" for sign, bound in bounds if bound is not None)
