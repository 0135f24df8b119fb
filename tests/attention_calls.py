"""Inputs of attention, and the check of its C++ kernels, for several test files."""

import torch

from fastgpt.testing import numerics
from fastgpt.testing.attention_parity import compare, run_cpp

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Packed sequences: of 3, 0 and 5 queries, and 5, 1 and 6 keys.
CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 5, 6, 12], dtype=torch.int32)


def random_qkv(B, H, H_kv, T, S, D, dtype=torch.float32, seed=0):
    """q (B, H, T, D), k and v (B, H_kv, S, D), with tokens before heads in memory, as a model has them. D: or a pair (D, D_v)."""
    D, D_v = D if isinstance(D, tuple) else (D, D)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=generator).transpose(1, 2).to(dtype)
    k, v = (torch.randn(B, S, H_kv, size, generator=generator).transpose(1, 2).to(dtype) for size in (D, D_v))
    return q, k, v


def check_all(call, run=run_cpp, packing=None):
    """Checks the C++ kernels, or another `run`, forward and backward."""
    for name, actual, yardstick in compare(call, run, packing):
        numerics.check(actual, yardstick, name=name)


def packed(q, k, v):
    """Of a batch of one, (1, heads, total, head dim) -> (total, heads, head dim)."""
    return (x[0].transpose(0, 1) for x in (q, k, v))
