"""fastgpt as PyTorch's flash attention: on a CPU, the operators are overridden there for the tests."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_flash_attn import packed_inputs, packed_reference, paged, random, reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out

from fastgpt.integrations import flash_provider
from fastgpt.ops.dropout import keep_mask
from fastgpt.testing import numerics

operators = torch.ops.aten
NAMES = [
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", "_flash_attention_forward",
    "_flash_attention_forward_no_dropout_inplace", "_flash_attention_backward",
]  # fmt: skip


@pytest.fixture
def on_cpu():
    handle = flash_provider.register("CPU")
    yield
    handle.remove()


def overridden(key):
    return [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for name in NAMES]


def test_activate_and_restore_flash_attention_impl():
    assert "fastgpt" in torch.nn.attention.list_flash_attention_impls()
    before = overridden("CUDA")
    assert torch.nn.attention.current_flash_attention_impl() is None
    for _ in range(2):
        torch.nn.attention.activate_flash_attention_impl("fastgpt")
        assert torch.nn.attention.current_flash_attention_impl() == "fastgpt" and all(overridden("CUDA"))
    torch.nn.attention.restore_flash_attention_impl()
    assert torch.nn.attention.current_flash_attention_impl() is None and overridden("CUDA") == before


@pytest.mark.slow
def test_importing_activates_nothing():
    program = (
        "import torch; has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        f"names = {NAMES}; before = [has('aten::' + name, 'CUDA') for name in names];"
        "import fastgpt.integrations.flash_provider, fastgpt.integrations.sdpa;"
        "assert before == [has('aten::' + name, 'CUDA') for name in names];"
        "assert not has('aten::scaled_dot_product_attention', 'CUDA')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_the_handle_removes_the_overrides():
    handle = flash_provider.register("CPU")
    assert all(overridden("CPU"))
    handle.remove()
    assert not any(overridden("CPU"))


def inputs(T=6, S=6, order=(0, 1, 2, 3), dtype=torch.float32):
    """(B, H, T, D), in memory in some order of these dimensions."""
    shapes = [(2, 4, n, 16) for n in (T, S, S)]
    back = [order.index(i) for i in range(4)]
    return [random(*(shape[i] for i in order), seed=seed).permute(back).to(dtype) for seed, shape in enumerate(shapes)]


def heads_last(function, q, k, v, **options):
    """The reference of (B, H, T, D)."""
    rows = [function(*(x[b].transpose(0, 1) for x in (q, k, v)), **options) for b in range(len(q))]
    return torch.stack([out.transpose(0, 1) for out, _ in rows]), torch.stack([lse for _, lse in rows])


def gradients(function, tensors, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse, *_ = function(*leaves)
    dout = random(*out.shape, seed=9).to(out)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


def check(function, expected, tensors, dtype):
    actual = gradients(function, tensors, dtype)
    numerics.check(actual, lambda: gradients(expected, tensors, torch.float64), weights=dtype)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
@pytest.mark.parametrize("causal, T, S", [(False, 6, 6), (True, 6, 6), (True, 3, 7), (False, 1, 9)])
def test_scaled_dot_product_attention(causal, T, S, order, dtype, on_cpu):
    tensors = inputs(T, S, order, dtype)
    out, _, *grads = check(
        lambda q, k, v: operators._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3),
        lambda q, k, v: heads_last(reference, q, k, v, causal=causal, softmax_scale=0.3),
        tensors, dtype,
    )  # fmt: skip
    for result, x in zip((out, *grads), (tensors[0], *tensors)):
        assert result.stride() == torch.empty_like(x).stride()  # as PyTorch's meta function has it


def test_results_are_as_graphs_expect_them(on_cpu):
    arguments = inputs()
    actual = operators._scaled_dot_product_flash_attention(*arguments)
    expected = operators._scaled_dot_product_flash_attention(*(x.to("meta") for x in arguments))
    for ours, theirs in zip(actual, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        else:
            assert ours == theirs or ours is None


@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (3, 0), (-1, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(causal, window, on_cpu):
    left, right = window

    def ours(q, k, v):
        return operators._flash_attention_forward(
            q, k, v, None, None, 5, 8, 0.0, causal, False, window_size_left=left, window_size_right=right
        )

    def backward(q, k, v):  # the operator has no gradient of its own
        out, lse, state, unused, _ = ours(q, k, v)
        dout = random(*out.shape, seed=9)
        return out, lse, *operators._flash_attention_backward(
            dout, q, k, v, out, lse, None, None, 5, 8, 0.0, causal, state, unused,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip

    def expected(q, k, v):
        rows = [reference(*x, causal=causal, window_size=window) for x in zip(q, k, v)]
        return tuple(torch.stack(column) for column in zip(*rows))

    tensors = [x.transpose(1, 2) for x in inputs(5, 8)]
    actual = backward(*tensors)
    numerics.check(actual, lambda: gradients(expected, tensors, torch.float64))


def varlen(q, k, v, packing, window=(-1, -1), **options):
    return varlen_attn(q, k, v, *packing, window_size=window, enable_gqa=True, return_aux=AuxRequest(lse=True), **options)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (3, -1)])
def test_packed_sequences(window, on_cpu):
    tensors, packing = packed_inputs()
    check(
        lambda q, k, v: varlen(q, k, v, packing, window, scale=0.3),
        lambda q, k, v: packed_reference(q, k, v, *packing, window_size=window, softmax_scale=0.3),
        tensors, torch.float32,
    )  # fmt: skip


def test_packed_sequences_into_a_given_result(on_cpu):
    (q, k, v), packing = packed_inputs()
    expected, lse = varlen(q, k, v, packing, (2, 2))
    out = torch.empty_like(q)
    aux = AuxRequest(lse=True)
    result, same = varlen_attn_out(out, q, k, v, *packing, window_size=(2, 2), enable_gqa=True, return_aux=aux)
    assert result is out and torch.equal(out, expected) and torch.equal(same, lse)
    check_forward((out, lse), packed_reference, (q, k, v, *packing), {"window_size": (2, 2)})


def check_forward(actual, function, arguments, options):
    numerics.check(actual, lambda: function(*(x.double() for x in arguments[:3]), *arguments[3:], **options))


def test_pages_and_lengths(on_cpu):
    """As an engine decodes: one query of each sequence, keys in pages, as many as are used."""
    used = torch.tensor([5, 9, 2], dtype=torch.int32)
    q, k, v = random(3, 4, 16), random(3, 9, 2, 16, seed=1), random(3, 9, 2, 16, seed=2)
    (k_pool, table), (v_pool, _) = paged(k, 4), paged(v, 4)
    cu_q = torch.arange(4, dtype=torch.int32)
    actual = varlen_attn(
        q, k_pool, v_pool, cu_q, None, 1, 9, window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table
    )
    dense = operators._flash_attention_forward(
        q.unsqueeze(1), k, v, None, None, 1, 9, 0.0, True, False, seqused_k=used
    )[0].squeeze(1)  # fmt: skip
    for (b, n), out in itertools.product(enumerate(used), (actual, dense)):
        check_forward(
            (out[b : b + 1],), lambda *x, **y: reference(*x, **y)[:1], (q[b : b + 1], k[b, :n], v[b, :n]), {"causal": True}
        )


def test_dropout_is_the_same_in_the_gradient(on_cpu):
    q, k, v = (x.requires_grad_() for x in inputs())
    out, _, _, _, _, _, state, *_ = operators._scaled_dot_product_flash_attention(q, k, v, 0.4)
    kept = keep_mask(state.view(torch.int64)[:1], 0.4, 2, 4, 6, 6, "cpu")
    assert state.shape == (2,) and 0.4 < kept.float().mean() < 0.8
    dout = random(*out.shape, seed=9)

    def expected():
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out = ((leaves[0] @ leaves[1].mT / 4).softmax(-1) * kept / 0.6) @ leaves[2]
        return out.detach(), *torch.autograd.grad(out, leaves, dout.double())

    numerics.check((out.detach(), *torch.autograd.grad(out, (q, k, v), dout)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=str)
def test_graphs(order, on_cpu):
    """The compiler checks strides."""

    def function(q, k, v):
        return operators._scaled_dot_product_flash_attention(q * 2, k, v, 0.0, True)[:2]

    check(
        torch.compile(function, fullgraph=True), lambda q, k, v: heads_last(reference, q * 2, k, v, causal=True),
        inputs(order=order), torch.float32,
    )  # fmt: skip


def test_unsupported_arguments_raise(on_cpu):
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="^return_debug_mask: expected False"):
        operators._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)
    state = torch.zeros(2, dtype=torch.uint64)
    with pytest.raises(RuntimeError, match="^window_size_right: expected -1 or 0"):
        operators._flash_attention_backward(
            q, q, k, v, q, q[..., 0], None, None, 4, 4, 0.0, False, state, state[0], window_size_right=2
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_dot_product_attention_on_a_gpu(dtype):
    """Forward and backward, through PyTorch's function and through a graph."""
    tensors = [x.cuda() for x in inputs(256, 256, dtype=dtype)]

    def function(q, k, v):
        backend = SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(())

    yardsticks = numerics.simulate(lambda: gradients(function, tensors, torch.float64), weights=dtype)
    torch.nn.attention.activate_flash_attention_impl("fastgpt")
    try:
        for run in (function, torch.compile(function)):
            numerics.check(gradients(run, tensors, dtype), yardsticks)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
