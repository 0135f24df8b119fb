"""Inputs of products whose numbers differ much in size."""

import torch


def wide_ranges(rows, columns):
    """Pairs of x (rows, columns), whose numbers differ in size, and the columns whose weights shall be zero."""
    x, ids = torch.randn(rows, columns), torch.arange(columns)
    for where in (ids == 5, ids // 2 == 3, ids // 4 == 1, ids < 16, ids % 2 == 1, ids % 4 == 0, ids % 16 < 8, ids % 32 < 16):
        for size in (20, 2000):
            yield torch.where(where, (x.abs() + 1) * size, x), where
    nowhere = ids < 0
    for exponents in (torch.rand(x.shape) * 24 - 14, torch.full(x.shape, -13.0), ids % 32 // 4 * 4.0 - 14):
        yield x * exponents.exp2(), nowhere
    yield (x - 1.5).relu(), nowhere
    yield x + 100, nowhere
