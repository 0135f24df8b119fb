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
from fastgpt.ops.implementations import choose, explain_call
from fastgpt.ops.library import library

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def attention(q, k, v, *, causal=True, scale=None, kv_lengths=None, return_lse=False, impl=None):
    """Softmax attention over keys and values, computed tile by tile.

        out[b,h,i] = sum_j softmax_j(scale * q[b,h,i]·k[b,h//g,j]) v[b,h//g,j],   g = H // H_kv

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, D <= 256, last dimension contiguous, other strides free. fp64 too, which only
            the reference serves.
        k, v: (B, H_kv, S, D), dtype and device of q; H must be a multiple of H_kv.
        causal: bottom-right aligned: query i sees key j when j <= i + L - T, where L is kv_lengths[b] or S.
            T=2, L=5 attends  1 1 1 1 0
                              1 1 1 1 1
        scale: factor on q·k; default 1 / sqrt(D).
        kv_lengths: (B,) int32 on q's device, each in [0, S]; keys at and past it are never read. This is how a
            cache of capacity S is attended. A value outside [0, S] is clamped to that range.
        return_lse: also return the log-sum-exp of each row's scaled scores.
        impl: "triton" (CUDA), "cpp" (CPU) or "reference"; None picks the first that can serve the call. A named
            one never falls back: it raises ValueError with the reason. `fastgpt.explain` tells without running.

    Returns:
        out (B, H, T, D) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) fp32, natural log.
        A row that sees no key gives zeros and lse = -inf.

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, impl): argument, expected, got.
    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
    """
    try:
        chosen = choose("attention", IMPLEMENTATIONS, impl, q, k, v)
        if chosen != "cpp":  # which checks for itself, in a fraction of the time
            _check(q, k, v, scale, kv_lengths)
        if chosen == "reference":
            return attention_reference(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths, return_lse=return_lse)
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, lse = torch.ops.fastgpt.attention_forward.default(q, k, v, kv_lengths, causal, scale)
    except (RuntimeError, AttributeError):
        _check(q, k, v, scale, kv_lengths)  # raises the error that names the argument
        raise
    return (out, lse) if return_lse else out


def attention_reference(q, k, v, *, causal=True, scale=None, kv_lengths=None, return_lse=False, impl=None):
    """The same function in plain PyTorch: every device, every float dtype (float64 too), differentiable.

    Scores and softmax are computed in fp32 at least. Holds the (B, H, T, S) scores in memory.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

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


def _check(q, k, v, scale, kv_lengths):
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
    require_shape("k", k, (B, H_kv, S, D), "(B, H_kv, S, D) to match q")
    require_shape("v", v, (B, H_kv, S, D), "(B, H_kv, S, D) to match k")
    for name, tensor in (("k", k), ("v", v)):
        require_dtype(name, tensor, (q.dtype,))
        require_device(name, tensor, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_last_dim_contiguous(name, tensor)
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if kv_lengths is not None:
        require_tensor("kv_lengths", kv_lengths, 1)
        require_dtype("kv_lengths", kv_lengths, (torch.int32,))
        require_shape("kv_lengths", kv_lengths, (B,), "(B,)")
        require_device("kv_lengths", kv_lengths, q.device)


def explain(q, k, v, *, causal=True, scale=None, kv_lengths=None, return_lse=False, impl=None):
    """Implementation -> "chosen", "available", or why it refuses this call."""
    _check(q, k, v, scale, kv_lengths)
    return explain_call(IMPLEMENTATIONS, q, k, v)


def _kernel_refuses(q, k, v):
    if q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward, and q, k or v requires gradients"
    return None


def _triton_refuses(q, k, v):
    if not q.is_cuda:
        return f"it runs on CUDA tensors, and q is on {q.device}"
    if not TRITON_INSTALLED:
        return "triton is not installed"
    return _kernel_refuses(q, k, v)


def _cpp_refuses(q, k, v):
    if q.device.type != "cpu":
        return f"it runs on CPU tensors, and q is on {q.device}"
    return _kernel_refuses(q, k, v)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"triton": _triton_refuses, "cpp": _cpp_refuses, "reference": lambda *_: None}


library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? kv_lengths, bool causal, float scale) -> (Tensor, Tensor)"
)


@torch.library.register_fake("fastgpt::attention_forward", lib=library)
def _attention_forward_fake(q, k, v, kv_lengths, causal, scale):
    _check(q, k, v, scale, kv_lengths)
    B, H, T, D = q.shape
    # Token-major storage: the model reads the result as (B, T, H * D) without a copy.
    out = q.new_empty(B, T, H, D).transpose(1, 2)
    return out, q.new_empty(B, H, T, dtype=torch.float32)


def _attention_forward_triton(q, k, v, kv_lengths, causal, scale):
    from fastgpt.kernels.attention import attention_forward  # Triton is imported only when a CUDA tensor needs it

    return attention_forward(q, k, v, causal, scale, kv_lengths)


library.impl("attention_forward", _attention_forward_triton, "CUDA")
