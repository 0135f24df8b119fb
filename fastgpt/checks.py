"""Input checks that the package shares. Each error begins with the argument's name and says what was expected and what
came: TypeError for a wrong type or dtype, ValueError for a wrong shape, layout, device or range."""

import operator
import sys

import torch

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # what torch.compile and torch.export trace numbers as


def require_tensor(name: str, value, ndim: int | None = None) -> None:
    """A plain strided tensor: neither nested nor sparse, which kernels cannot read."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {got}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")


def require_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {expected} {meaning}, got {tuple(value.shape)}")


def require_dtype(name: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {value.dtype}")


def require_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def require_last_dim_contiguous(name: str, value: torch.Tensor) -> None:
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got strides {value.stride()}")


def require_broadcastable(name: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    sizes = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if value.dim() > len(shape) or any(size not in (1, whole) for size, whole in zip(sizes, shape)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape} {meaning}, got {tuple(value.shape)}")


def require_choice(name: str, value, choices) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def require_flag(name: str, value) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def require_integer(name: str, value, least: int | None = None, most: int | None = None, optional: bool = False) -> int | None:
    """The value as an int; NumPy's integers are such, bools and floats are not. optional: None is fine, too."""
    if optional and value is None:
        return None
    expected = "an integer" + _bounds(least, most) + (" or None" if optional else "")
    if not isinstance(value, SYMBOLS):
        try:
            integer = None if isinstance(value, (bool, torch.Tensor)) else operator.index(value)
        except TypeError:
            integer = None
        if integer is None:
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
        value = integer
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value


def require_number(
    name: str, value, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, optional: bool = False,
) -> float | None:  # fmt: skip
    """A finite number, as an int or a float; bools and tensors are none. least and most are allowed, above and below not."""
    if optional and value is None:
        return None
    expected = "a finite number" + _bounds(least, most, above, below) + (" or None" if optional else "")
    if isinstance(value, SYMBOLS):
        return value
    try:
        convert = int if isinstance(value, int) else float  # an int may be too large for a float, or lose digits
        number = None if isinstance(value, (bool, str, bytes, torch.Tensor)) else convert(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    value = number
    outside = (
        (least is not None and value < least) or (most is not None and value > most)
        or (above is not None and value <= above) or (below is not None and value >= below)
    )  # fmt: skip
    if outside or not -sys.float_info.max <= value <= sys.float_info.max:  # an int may be larger than any float
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value


def _bounds(least=None, most=None, above=None, below=None) -> str:
    bounds = (">=", least), ("<=", most), (">", above), ("<", below)
    return " and".join(f" {sign} {bound}" for sign, bound in bounds if bound is not None)
