"""The registered operations of attention: opcheck, torch.compile, and the choice of implementation."""

import functools

import pytest
import torch
from attention_calls import CU_K, CU_Q, packed, random_qkv

import fastgpt
from fastgpt import attention, attention_varlen
from fastgpt.ops import attention as ops
from fastgpt.ops.quantization import quantize
from fastgpt.testing.attention_features import inputs, options, paged

pytestmark = pytest.mark.threads


# Registration


@pytest.mark.slow
def test_opcheck():
    q, k, v = random_qkv(2, 4, 2, 3, 20, (16, 24))
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    for arguments in ({}, {"kv_lengths": lengths}, {"kv_lengths": lengths, "window": 7}):
        torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, (q, k, v, True, 0.25), arguments)
    (k, k_scale), (v, v_scale) = quantize(k, torch.int8), quantize(v, torch.int8)
    (k, table), (v, _), (k_scale, _), (v_scale, _) = (paged(x, 8) for x in (k, v, k_scale, v_scale))
    arguments = {"kv_lengths": lengths, "block_table": table, "k_scale": k_scale, "v_scale": v_scale}
    torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, (q, k, v, True, 0.25), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "lengths", "bias of queries", "everything"])
def test_opcheck_of_gradients(feature):
    call = ops.Call(*random_qkv(2, 4, 2, 3, 20, (16, 24)), **{"scale": 0.25} | options(feature, 2, 4, 3, 20, torch.float32))
    torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, tuple(call))
    out, lse = torch.ops.fastgpt.attention_forward(*call)
    arguments = (out, lse, out, lse, call.bias is not None, *call[:12], call.dropout_p, call.dropout_seed)
    torch.library.opcheck(torch.ops.fastgpt.attention_backward.default, arguments)


@pytest.mark.slow
def test_opcheck_of_packed_sequences():
    q, k, v = random_qkv(1, 4, 2, 8, 12, (16, 24))
    packing, options = (CU_Q, CU_K, 5, 6), {"sinks": torch.ones(4)}
    torch.library.opcheck(torch.ops.fastgpt.attention_varlen_forward.default, (*packing, q, k, v, True, 0.25), options)
    out, lse = torch.ops.fastgpt.attention_varlen_forward(*packing, q, k, v, True, 0.25, **options)
    arguments = (out, None, out, lse, *packing, q, k, v, True, 0.25)
    torch.library.opcheck(torch.ops.fastgpt.attention_varlen_backward.default, arguments, options)


@pytest.mark.parametrize("D", [16, (16, 24)])
def test_fake_strides_are_real_strides(D):
    q, k, v = random_qkv(2, 4, 2, 3, 20, D)
    real = torch.ops.fastgpt.attention_forward(q, k, v, True, 0.25)
    fake = torch.ops.fastgpt.attention_forward(q.to("meta"), k.to("meta"), v.to("meta"), True, 0.25)
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "window", "sinks", "mask", "dropout", "everything"])
def test_compiles_as_one_graph(feature):
    q, k, v = inputs(2, 4, 2, 5, 9, (8, 12), torch.float32)
    arguments = options(feature, 2, 4, 5, 9, torch.float32)
    torch._dynamo.reset()  # each feature compiles this test's function anew, which is limited

    def eager(*x):
        return attention(*x, **arguments, return_lse=True)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), eager(q, k, v))
    q.requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(q, k, v)[0].sum(), q) for f in (compiled, eager)))


# Choice of implementation


def test_explain_names_the_implementation_and_the_reasons():
    q, k, v = random_qkv(1, 1, 1, 2, 2, 16)
    assert fastgpt.explain(attention, q, k, v) == {
        "triton": "it runs on CUDA tensors, and q is on cpu",
        "cpp": "chosen",
        "reference": "available",
    }
    assert fastgpt.explain(attention, q.requires_grad_(), k, v)["cpp"] == "chosen"
    table = torch.zeros(1, 1, dtype=torch.int32)
    reasons = fastgpt.explain(attention, q, k, v, block_table=table)
    assert reasons["reference"] == "chosen" and "no backward through a block table" in reasons["cpp"]
    reasons = fastgpt.explain(attention, *(x.double() for x in (q, k, v)))
    assert reasons["reference"] == "chosen" and "q is torch.float64" in reasons["cpp"]
    packed_call = (*packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32)), CU_Q, CU_K, 5, 6)
    assert fastgpt.explain(attention_varlen, *packed_call)["cpp"] == "chosen"
    with pytest.raises(ValueError, match="operation: expected one of fastgpt.attention"):
        fastgpt.explain(print, 1)


def test_explain_heeds_impl():
    """It is chosen, or refused as by the call."""
    x = torch.zeros(1, 1, 1, 16)
    reasons = fastgpt.explain(fastgpt.attention, x, x, x, impl="reference")
    assert reasons["reference"] == "chosen" and "chosen" not in (reasons["cpp"], reasons["triton"])
    for call in (fastgpt.attention, functools.partial(fastgpt.explain, fastgpt.attention)):
        with pytest.raises(
            ValueError, match="^impl='triton' cannot serve this call: it runs on CUDA tensors, and q is on cpu$"
        ):
            call(x, x, x, impl="triton")
        with pytest.raises(ValueError, match="^impl: expected one of 'cpp', 'triton', 'reference' or None, got 'cuda'$"):
            call(x, x, x, impl="cuda")


def test_a_named_implementation_does_not_fall_back():
    q, k, v = random_qkv(1, 1, 1, 2, 2, 16)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: it runs on CUDA tensors"):
        attention(q, k, v, impl="triton")
    with pytest.raises(ValueError, match="impl='cpp' cannot serve this call: it has no backward through a block table"):
        attention(q.requires_grad_(), k, v, impl="cpp", block_table=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="impl: expected one of 'cpp', 'triton', 'reference' or None, got 'flash'"):
        attention(q, k, v, impl="flash")
