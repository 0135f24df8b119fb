"""Limits of one launch: counts that kernels hold in 32 bits, and the number of programs of a grid.

Addresses are 64-bit. Numbers of tokens, heads and sequences and coordinates of bulk copies are 32-bit; kernels add a few of
them, so each leaves some bits free.
"""

from torch import Tensor

MAX_COUNT = 2**28  # tokens of a sequence or of all packed sequences, heads, sequences, pages
MAX_PROGRAMS = 2**31 - 1


def check_sizes(**tensors: Tensor | None) -> None:
    """Raises ValueError if a dimension is larger than the kernels can count."""
    for name, x in tensors.items():
        if x is not None and max(x.shape) > MAX_COUNT:
            raise ValueError(f"{name}: expected no dimension above 2^28 = {MAX_COUNT}, got {tuple(x.shape)}")


def check_count(name: str, what: str, count: int) -> None:
    """Raises ValueError that begins with the argument's name if `count` is more than the kernels can count."""
    if count > MAX_COUNT:
        raise ValueError(f"{name}: expected at most 2^28 = {MAX_COUNT} {what}, got {count}")


def grid(name: str, *factors: int) -> tuple[int, int, int]:
    """A one-dimensional grid; the number of programs is the product of the factors.

    Raises: ValueError that begins with the argument's name if it is more than a grid holds.
    """
    programs = 1
    for factor in factors:
        programs *= factor
    if programs > MAX_PROGRAMS:
        made = " * ".join(map(str, factors))
        raise ValueError(f"{name}: expected work for at most 2^31 - 1 programs, got {made} = {programs}; split the batch")
    return programs, 1, 1


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv takes microseconds outside of kernels."""
    return -(-a // b)
