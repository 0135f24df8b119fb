"""Which calls of scaled_dot_product_attention the kernels serve, and why not the others."""

import math
from typing import NamedTuple

import torch

from fastgpt.ops.attention.checks import KERNEL_DTYPES, MAX_HEAD_DIM, triton_refuses_head_dims
from fastgpt.ops.derivatives import transforms_active
from fastgpt.ops.implementations import triton_unusable

LARGEST_SCALE = torch.finfo(torch.float32).max
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})  # no subclasses, which may override the function


class Call(NamedTuple):
    """The arguments of scaled_dot_product_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def refuses(call: Call) -> str | None:
    """Why PyTorch's function must serve the call, or None."""
    reason = refuses_surroundings(call)
    return refuses_arguments(call) if reason is None else reason


def refuses_surroundings(call: Call) -> str | None:
    """Why the kernels may not look at the arguments: their types, and modes and transforms that are active; or None."""
    if torch.compiler.is_dynamo_compiling():  # none of this occurs in a graph
        return None
    for x in call[:3] if call.attn_mask is None else call[:4]:
        if type(x) not in PLAIN_TENSORS:
            return f"it takes torch.Tensor, and an argument is a {type(x).__name__}"
        if x.is_nested or x.layout is not torch.strided:
            return "it takes dense tensors"
    if (
        type(call.dropout_p) not in (float, int)
        or type(call.is_causal) is not bool
        or type(call.scale) not in (type(None), float, int)
        or type(call.enable_gqa) is not bool
    ):
        return "dropout_p, is_causal, scale or enable_gqa is of a type that PyTorch converts or rejects"
    if torch._C._len_torch_dispatch_stack():
        return "a mode of __torch_dispatch__ is active, which must see PyTorch's operators"
    if transforms_active():
        return "a transform of torch.func or forward-mode differentiation is active"
    if not torch._C._get_flash_sdp_enabled():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel, torch.backends.cuda.enable_flash_sdp)"
    return None


def refuses_arguments(call: Call) -> str | None:
    """Why the kernels do not take the arguments, whose types are known to be right; or None."""
    query, key, value = call[:3]
    if call.scale is not None and not abs(call.scale) <= LARGEST_SCALE:
        return f"scale is {call.scale}, which is not finite in fp32"
    dtype = query.dtype
    if dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and query is {dtype}"
    if key.dtype is not dtype or value.dtype is not dtype:
        return f"query, key and value are {dtype}, {key.dtype} and {value.dtype}"
    if not (query.is_cpu or query.is_cuda):
        return f"it runs on CPU and CUDA tensors, and query is on {query.device}"
    if key.device != query.device or value.device != query.device:
        return f"query, key and value are on {query.device}, {key.device} and {value.device}"
    if query.is_cuda and (reason := triton_unusable(query.device)) is not None:
        return reason
    reason = _refuses_shapes(query.shape, key.shape, value.shape, call.is_causal, call.enable_gqa)
    if reason is None and query.is_cuda:
        gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        reason = triton_refuses_head_dims(query, value, gradients)
    if reason is not None:
        return reason
    if not 0 <= call.dropout_p < 1:
        return f"it takes 0 <= dropout_p < 1, and dropout_p is {call.dropout_p}"
    return None if call.attn_mask is None else _refuses_mask(call)


def _refuses_shapes(q, k, v, is_causal, enable_gqa) -> str | None:
    dims = len(q)
    if dims < 2 or len(k) != dims or len(v) != dims:
        return "query, key and value have fewer than two dimensions, or not the same number"
    if q[:-3] != k[:-3] or q[:-3] != v[:-3]:
        return "query, key and value have different batch sizes"
    if dims == 3 and not q[0] == k[0] == v[0] or dims < 4 and enable_gqa:
        return "query, key and value have different batch sizes, or enable_gqa is set without a head dimension"
    if dims >= 4:
        H, H_kv = q[-3], k[-3]
        if v[-3] != H_kv or (H != H_kv and H_kv != 1 and (not enable_gqa or H_kv == 0 or H % H_kv)):
            return f"query, key and value have {H}, {H_kv} and {v[-3]} heads, enable_gqa is {enable_gqa}"
    if k[-2] != v[-2] or q[-1] != k[-1]:
        return f"query, key and value end in {tuple(q[-2:])}, {tuple(k[-2:])} and {tuple(v[-2:])}"
    if not 1 <= q[-1] <= MAX_HEAD_DIM or not 1 <= v[-1] <= MAX_HEAD_DIM:
        return f"it takes head dims from 1 to {MAX_HEAD_DIM}, and those are {q[-1]} and {v[-1]}"
    if k[-2] == 0 or math.prod(q) == 0:
        return "there is nothing to compute"
    if is_causal and q[-2] > k[-2]:
        return "is_causal with more queries than keys takes two calls"
    return None


def _refuses_mask(call) -> str | None:
    query, attn_mask = call.query, call.attn_mask
    if call.is_causal:
        return "attn_mask and is_causal are both given"
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"it takes an attn_mask of bool, the dtype of query or fp32, and it is {attn_mask.dtype}"
    if attn_mask.device != query.device:
        return f"attn_mask is on {attn_mask.device}, and query on {query.device}"
    sizes, full = tuple(attn_mask.shape), (*query.shape[:-1], call.key.shape[-2])
    if not 2 <= len(sizes) <= len(full) or any(size not in (1, n) for size, n in zip(reversed(sizes), reversed(full))):
        return f"it takes an attn_mask of at least two dimensions that broadcasts to {full}, and it is {sizes}"
    return None
