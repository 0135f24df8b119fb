"""Whether the tensors of a KV-cache update share memory, which the Triton kernel does not take."""

from fastgpt.checks import require_no_overlap


def check_overlap(written: dict, read: dict) -> None:
    """Raises ValueError if a written tensor overlaps itself, or any other. Both arguments: name -> tensor or None."""
    regions = []
    for name, x in written.items():
        if x is None or x.numel() == 0:
            continue
        require_no_overlap(name, x)
        for other, y, region in regions:
            if _overlap(_region_of(x), region) and not _are_disjoint_views(x, y):
                raise ValueError(f"{name}: expected memory apart from that of {other}")
        regions.append((name, x, _region_of(x)))
    for name, x in read.items():
        for other, _, region in regions if x is not None and x.numel() else ():
            if _overlap(_region_of(x), region):
                raise ValueError(f"{name}: expected memory apart from that of {other}, which is written; clone it")


def _region_of(x) -> tuple[int, int, int]:
    """The storage of a non-empty tensor, its first byte there, and the byte past its last."""
    first, size = x.storage_offset(), x.element_size()
    last = first + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.untyped_storage()._cdata, first * size, (last + 1) * size


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _are_disjoint_views(x, y) -> bool:
    """Whether two views with the same strides share no element, though their regions overlap (as k and v of one tensor do)."""
    dims = sorted(((stride, n) for stride, n in zip(x.stride(), x.shape) if n > 1), reverse=True)
    return (x.stride(), x.dtype) == (y.stride(), y.dtype) and not _is_offset_of(x.storage_offset() - y.storage_offset(), dims)


def _is_offset_of(distance: int, dims: list[tuple[int, int]]) -> bool:
    """Whether two elements of a tensor with these (stride, size), largest strides first, are `distance` elements apart."""
    if not dims:
        return distance == 0
    (stride, size), *rest = dims
    steps = distance // stride, distance // stride + 1
    return any(abs(i) < size and _is_offset_of(distance - i * stride, rest) for i in steps)
