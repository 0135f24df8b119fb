"""The attention operation: contract, input checks, reference, and choice of implementation."""

import importlib.util
import math

import torch

from fastgpt.ops.checks import (
    require_device,
    require_dtype,
    require_last_dim_contiguous,
    require_shape,
    require_tensor,
)
from fastgpt.ops.implementations import choose, explain_call, runs_elsewhere
from fastgpt.ops.library import library
from fastgpt.ops.quantisation import QUANTISED_DTYPES, dequantise

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def attention(
    q, k, v,
    *, causal=True, scale=None, window=None, kv_lengths=None, block_table=None, k_scale=None, v_scale=None,
    return_lse=False, impl=None,
):  # fmt: skip
    """Softmax attention over keys and values, computed tile by tile.

        out[b,h,i] = sum_j softmax_j(scale * q[b,h,i]·k[b,h//g,j]) v[b,h//g,j],   g = H // H_kv

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, D <= 256, last dimension contiguous, other strides free. fp64 too, which only
            the reference serves.
        k, v: (B, H_kv, S, D), or with a block table a pool of pages (num_pages, H_kv, page, D); device of q, and its
            dtype, or int8 or float8_e4m3fn with scales; H must be a multiple of H_kv.
        causal: bottom-right aligned: query i sees key j when j <= i + L - T, where L is kv_lengths[b] or S.
            T=2, L=5 attends  1 1 1 1 0
                              1 1 1 1 1
        scale: factor on q·k; default 1 / sqrt(D).
        window: of these keys, query i sees only those with j > i + L - T - window: the last `window`, that at its own
            position included. window=2 attends  0 0 1 1 0
                                                 0 0 0 1 1
        kv_lengths: (B,) int32 on q's device, each in [0, S]; keys at and past it are never read. This is how a
            cache of capacity S is attended. A value outside [0, S] is clamped to that range.
        block_table: (B, pages) int32 on q's device. Key j of sequence b lies in row j % page of page
            block_table[b, j // page]; S is then pages · page. Entries past kv_lengths may be anything.
        k_scale, v_scale: (B, H_kv, S), or (num_pages, H_kv, page) with a block table, fp32: key j stands for
            k_scale[b,h,j] · k[b,h,j]. See `kv_cache_update`, which writes them.
        return_lse: also return the log-sum-exp of each row's scaled scores.
        impl: "triton" (CUDA), "cpp" (CPU) or "reference"; None picks the first that can serve the call. A named
            one never falls back: it raises ValueError with the reason. `fastgpt.explain` tells without running.

    Returns:
        out (B, H, T, D) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) fp32, natural log.
        A row that sees no key gives zeros and lse = -inf.

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, impl; on CPU a page outside the pool):
        argument, expected, got.
    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
    """
    call = (q, k, v, window, block_table, k_scale, v_scale)
    try:
        chosen = choose("attention", IMPLEMENTATIONS, impl, *call)
        if chosen != "cpp":  # which checks for itself, in a fraction of the time
            _check(*call, scale, kv_lengths)
        if chosen == "reference":
            return attention_reference(
                q, k, v, causal=causal, scale=scale, window=window, kv_lengths=kv_lengths, block_table=block_table,
                k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            )  # fmt: skip
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, lse = _attention_forward(
            q, k, v, kv_lengths, causal, scale, window, block_table, k_scale, v_scale
        )
    except (RuntimeError, AttributeError):
        _check(*call, scale, kv_lengths)  # raises the error that names the argument
        _check_pages(k, block_table, kv_lengths)
        raise
    return (out, lse) if return_lse else out


def attention_reference(
    q, k, v,
    *, causal=True, scale=None, window=None, kv_lengths=None, block_table=None, k_scale=None, v_scale=None,
    return_lse=False, impl=None,
):  # fmt: skip
    """The same function in plain PyTorch: every device, every float dtype (float64 too), differentiable.

    Scores and softmax are computed in fp32 at least. Holds the (B, H, T, S) scores in memory.
    """
    _check_pages(k, block_table, kv_lengths)
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), _keys(k, k_scale, block_table, dtype), _keys(v, v_scale, block_table, dtype)
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale

    key = torch.arange(S, device=q.device)
    query = torch.arange(T, device=q.device).unsqueeze(1)
    if kv_lengths is None:
        lengths = S
        hidden = torch.zeros(T, S, dtype=torch.bool, device=q.device)
    else:
        lengths = kv_lengths.clamp(0, S).view(B, 1, 1, 1)
        hidden = (key >= lengths).expand(B, 1, T, S)
        # A key that is never read must not reach the sums, not even as 0 · NaN.
        v = v.masked_fill((key >= lengths).transpose(-2, -1), 0.0)
    if causal:
        hidden = hidden | (key > query + lengths - T)
    if window is not None:
        hidden = hidden | (key <= query + lengths - T - window)
    blind = hidden.all(-1, keepdim=True)  # rows that see no key
    hidden = hidden & ~blind  # softmax over a row of -inf is NaN; such a row is zeroed below instead

    if H != H_kv:
        k = k.repeat_interleave(H // H_kv, dim=1)  # (B, H, S, D)
        v = v.repeat_interleave(H // H_kv, dim=1)
    scores = ((q * scale) @ k.transpose(-2, -1)).masked_fill(hidden, float("-inf"))  # (B, H, T, S)
    out = (scores.softmax(-1) @ v).masked_fill(blind, 0.0).to(out_dtype)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(blind.squeeze(-1), float("-inf")).to(dtype)


def _keys(x, scale, block_table, dtype):
    """Keys or values as the numbers they stand for: (B, H_kv, S, D) in `dtype`."""
    if block_table is not None:
        index = block_table.clamp(0, x.shape[0] - 1).long()  # entries that are never read may be anything
        # (B, pages, H_kv, page, D) -> (B, H_kv, pages * page, D); float8 has no indexing
        x = x.view(torch.uint8)[index].view(x.dtype) if x.itemsize == 1 else x[index]
        x = x.transpose(1, 2).flatten(2, 3)
        scale = None if scale is None else scale[index].transpose(1, 2).flatten(2, 3)
    return x.to(dtype) if scale is None else dequantise(x, scale, dtype)


def _check(q, k, v, window, block_table, k_scale, v_scale, scale, kv_lengths):
    require_tensor("q", q, 4)
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    B, H, T, D = q.shape
    _, H_kv, S, _ = k.shape
    require_dtype("q", q, (*KERNEL_DTYPES, torch.float64))
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim from 1 to {MAX_HEAD_DIM}, got {D} in shape {tuple(q.shape)}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {H_kv}")
    require_dtype("k", k, (q.dtype, *QUANTISED_DTYPES))
    require_dtype("v", v, (k.dtype,))
    first, meaning = B, "(B, H_kv, S, D)"
    tensors = {"k": k, "v": v}
    if block_table is not None:
        require_tensor("block_table", block_table, 2)
        require_dtype("block_table", block_table, (torch.int32,))
        require_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages)")
        first, meaning = k.shape[0], "(num_pages, H_kv, page, D)"
        tensors["block_table"] = block_table
    require_shape("k", k, (first, H_kv, S, D), f"{meaning} to match q")
    require_shape("v", v, (first, H_kv, S, D), f"{meaning} to match k")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is None) == (k.dtype in QUANTISED_DTYPES):
            wanted, got = ("a scale", "None") if x is None else ("None", "a scale")
            raise ValueError(f"{name}: expected {wanted} for k and v of {k.dtype}, got {got}")
        if x is not None:
            require_tensor(name, x, 3)
            require_dtype(name, x, (torch.float32,))
            require_shape(name, x, (first, H_kv, S), f"{meaning.rpartition(',')[0]}) to match k")
            tensors[name] = x
    if kv_lengths is not None:
        require_tensor("kv_lengths", kv_lengths, 1)
        require_dtype("kv_lengths", kv_lengths, (torch.int32,))
        require_shape("kv_lengths", kv_lengths, (B,), "(B,)")
        tensors["kv_lengths"] = kv_lengths
    for name, tensor in tensors.items():
        require_device(name, tensor, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_last_dim_contiguous(name, tensor)
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if window is not None and (not isinstance(window, (int, torch.SymInt)) or window < 1):
        raise ValueError(f"window: expected an integer >= 1 or None, got {window!r}")


def _check_pages(k, block_table, kv_lengths):
    """On CPU, raises ValueError if a page that would be read is not in the pool."""
    if block_table is None or block_table.device.type != "cpu":
        return
    num_pages, page = k.shape[0], k.shape[2]
    pages = torch.arange(block_table.shape[1])
    outside = (block_table < 0) | (block_table >= num_pages)
    if kv_lengths is not None:
        outside = outside & (pages * page < kv_lengths.unsqueeze(1))
    if outside.any():
        got = block_table[outside][0].item()
        raise ValueError(f"block_table: expected pages from 0 to {num_pages - 1}, got {got}")


def explain(
    q, k, v,
    *, causal=True, scale=None, window=None, kv_lengths=None, block_table=None, k_scale=None, v_scale=None,
    return_lse=False, impl=None,
):  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = (q, k, v, window, block_table, k_scale, v_scale)
    _check(*call, scale, kv_lengths)
    return explain_call(IMPLEMENTATIONS, *call)


def _kernel_refuses(q, k, v):
    if q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward, and q, k or v requires gradients"
    return None


def _triton_refuses(q, k, v, window, block_table, k_scale, v_scale):
    if not q.is_cuda:
        return runs_elsewhere("CUDA", "q", q.device)
    if not TRITON_INSTALLED:
        return "triton is not installed"
    for name, value in (("window", window), ("block_table", block_table), ("k_scale", k_scale)):
        if value is not None:
            return f"it does not take {name} yet"
    return _kernel_refuses(q, k, v)


def _cpp_refuses(q, k, v, window, block_table, k_scale, v_scale):
    if not q.is_cpu:
        return runs_elsewhere("CPU", "q", q.device)
    return _kernel_refuses(q, k, v)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cpp": _cpp_refuses, "triton": _triton_refuses, "reference": lambda *call: None}


library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? kv_lengths, bool causal, float scale, SymInt? window=None, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)"
)

_attention_forward = torch.ops.fastgpt.attention_forward.default


@torch.library.register_fake("fastgpt::attention_forward", lib=library)
def _attention_forward_fake(
    q, k, v, kv_lengths, causal, scale, window=None, block_table=None, k_scale=None, v_scale=None
):
    _check(q, k, v, window, block_table, k_scale, v_scale, scale, kv_lengths)
    B, H, T, D = q.shape
    # Token-major storage: the model reads the result as (B, T, H * D) without a copy.
    out = q.new_empty(B, T, H, D).transpose(1, 2)
    return out, q.new_empty(B, H, T, dtype=torch.float32)


def _attention_forward_triton(
    q, k, v, kv_lengths, causal, scale, window=None, block_table=None, k_scale=None, v_scale=None
):
    from fastgpt.kernels.attention import attention_forward  # Triton is imported only when a CUDA tensor needs it

    if refusal := _triton_refuses(q, k, v, window, block_table, k_scale, v_scale):
        raise ValueError(f"attention_forward on CUDA: {refusal}")
    return attention_forward(q, k, v, causal, scale, kv_lengths)


library.impl("attention_forward", _attention_forward_triton, "CUDA")
