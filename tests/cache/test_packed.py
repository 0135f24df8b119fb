"""Attention within packed sequences: what each sequence has alone, in every window, with gradients."""

import pytest
import torch

from fastgpt import attention_reference
from fastgpt.cache.packed import Packed
from fastgpt.model.rope import Rope
from fastgpt.ops.kv_cache_update import rope_reference
from fastgpt.testing import numerics

LENGTHS = [5, 1, 12, 7, 3]


def inputs(dtype=torch.float32, heads=4, kv_heads=2, head_dim=16):
    torch.manual_seed(0)
    return [torch.randn(1, n, sum(LENGTHS), head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads)]


def one_by_one(q, k, v, window=None, rotation=None):
    """Each sequence by itself, with a mask for the window."""
    outs = []
    for parts in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v))):
        positions = torch.arange(parts[0].shape[2])
        near = (positions[:, None] - positions).abs() < (window or len(positions))
        if rotation is not None:
            parts = *(rope_reference(x, positions[None], *rotation) for x in parts[:2]), parts[2]
        outs.append(attention_reference(*parts, causal=False, mask=near))
    return torch.cat(outs, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 7, 11, 12, 40])
def test_each_sequence_is_attended_alone(window, dtype):
    q, k, v = inputs(dtype)
    actual = Packed(LENGTHS).attend(0, q, k, v, window=window)
    numerics.check(actual, lambda: one_by_one(q.double(), k.double(), v.double(), window))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_positions_begin_with_each_sequence(window):
    q, k, v = inputs()
    packed, rotation = Packed(LENGTHS), Rope(8).rotation(12)
    assert packed.positions.tolist() == [i for n in LENGTHS for i in range(n)]
    actual = packed.attend(0, q, k, v, tuple(table[packed.positions] for table in rotation), window=window)
    numerics.check(actual, lambda: one_by_one(q.double(), k.double(), v.double(), window, rotation))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_gradients(window):
    dout = torch.randn(1, 4, sum(LENGTHS), 16, generator=torch.Generator().manual_seed(1))

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs()]
        return torch.autograd.grad(attend(*leaves, window=window), leaves, dout.to(dtype))

    actual = gradients(lambda *qkv, window: Packed(LENGTHS).attend(0, *qkv, window=window), torch.float32)
    numerics.check(actual, lambda: gradients(one_by_one, torch.float64))
