"""Input checks that operations share. Each error names the argument, what was expected and what came."""

import torch


def require_tensor(name: str, value, ndim: int | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
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


def require_number(name: str, value) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
