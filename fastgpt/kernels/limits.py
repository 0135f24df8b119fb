"""How much one launch can take: what the kernels count in 32 bits, and how many programs a grid holds.

Addresses are 64-bit. Numbers of tokens, heads and sequences are not, nor are places in bulk copies; kernels add up to a few of
them, so each leaves some bits.
"""

from torch import Tensor

MOST = 2**28  # of tokens of a sequence or of all packed ones, of heads, sequences and pages
MOST_PROGRAMS = 2**31 - 1


def check_sizes(**tensors: Tensor | None) -> None:
    """Raises ValueError if a dimension is larger than the kernels can count."""
    for name, x in tensors.items():
        if x is not None and max(x.shape) > MOST:
            raise ValueError(f"{name}: expected no dimension above 2^28 = {MOST}, got {tuple(x.shape)}")


def check_count(name: str, what: str, count: int) -> None:
    """Raises ValueError, which begins with the argument's name, if there is more than the kernels can count."""
    if count > MOST:
        raise ValueError(f"{name}: expected at most 2^28 = {MOST} {what}, got {count}")


def grid(name: str, *factors: int) -> tuple[int, int, int]:
    """The grid with so many programs, the product of the factors, in its first dimension.

    Raises: ValueError, which begins with the argument's name, if no grid has so many.
    """
    programs = 1
    for factor in factors:
        programs *= factor
    if programs > MOST_PROGRAMS:
        made = " * ".join(map(str, factors))
        raise ValueError(f"{name}: expected work for at most 2^31 - 1 programs, got {made} = {programs}; split the batch")
    return programs, 1, 1


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv takes microseconds outside of kernels."""
    return -(-a // b)
