"""Attention of packed sequences: parity, and equality with one call for each sequence."""

import pytest
import torch
from attention_calls import CU_K, CU_Q, DTYPES, check_all, packed

from fastgpt import attention, attention_varlen
from fastgpt.ops import attention as ops
from fastgpt.testing.attention_features import PACKED_FEATURES, inputs, options
from fastgpt.testing.attention_parity import run_cpp_packed

pytestmark = pytest.mark.threads


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("feature", PACKED_FEATURES[:-1])  # dropout counts sequences
def test_packed_sequences_are_a_loop(feature, impl):
    """The same bits, and gradients."""
    leaves = [x.requires_grad_() for x in inputs(1, 4, 2, 8, 12, (16, 24), torch.float32)]
    arguments = options(feature, 1, 4, 8, 12, torch.float32) | {"impl": impl, "return_lse": True}
    out, lse = attention_varlen(*packed(*leaves), CU_Q, CU_K, 5, 6, **arguments)
    assert out.shape == (8, 4, 24) and lse.shape == (4, 8)
    dout = torch.randn(out.shape)
    gradients = torch.autograd.grad(out, leaves, dout)
    q, k, v = leaves
    for b in range(3):
        rows, keys = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        expected = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **arguments)
        assert torch.equal(out[rows].transpose(0, 1), expected[0][0]) and torch.equal(lse[:, rows], expected[1][0])
        wanted = torch.autograd.grad(expected[0], leaves, dout[rows].transpose(0, 1).unsqueeze(0))
        for part, x, y in zip((rows, keys, keys), gradients, wanted):
            assert torch.equal(x[:, :, part], y[:, :, part])


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", PACKED_FEATURES)
@pytest.mark.parametrize("D", [40, (40, 24)], ids=str)
def test_parity_of_packed_sequences(D, feature, dtype):
    starts = ([0, 70, 70, 75, 205], [0, 90, 93, 98, 300])
    packing = ops.Packing(*(torch.tensor(numbers, dtype=torch.int32) for numbers in starts), 130, 202)
    call = ops.Call(*inputs(1, 4, 2, 205, 300, D, dtype), **{"scale": 0.15} | options(feature, 1, 4, 205, 300, dtype))
    check_all(call, lambda call, douts: run_cpp_packed(call, packing, douts), packing)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 2, 3, 4)}, ValueError, "q: expected 3 dimensions"),
        ({"cu_seqlens_q": CU_Q.long()}, TypeError, "cu_seqlens_q: expected dtype torch.int32"),
        ({"cu_seqlens_k": CU_K[:3]}, ValueError, r"cu_seqlens_k: expected shape \(B \+ 1,\)"),
        ({"cu_seqlens_k": CU_K + 1}, ValueError, r"cu_seqlens_k: expected numbers that ascend from 0 to 12, got \[1, 6"),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected at least 5, the longest sequence, got 4"),
        ({"max_seqlen_k": 5}, ValueError, "max_seqlen_k: expected at least 6, the longest sequence, got 5"),
        ({"window": 0}, ValueError, "window: expected an integer >= 1"),
    ],
)
def test_packing_errors(change, error, message):
    q, k, v = packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 5, "max_seqlen_k": 6}
    with pytest.raises(error, match=message):
        attention_varlen(**arguments | change)


def test_a_longest_sequence_may_be_any_integer():
    q, k, v = packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32))
    expected = attention_varlen(q, k, v, CU_Q, CU_K, 5, 6)
    assert torch.equal(attention_varlen(q, k, v, CU_Q, CU_K, 2**32 + 1, 2**40), expected)
