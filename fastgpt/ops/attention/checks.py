"""The input checks of attention, argument by argument."""

import torch

from fastgpt.checks import (
    is_fake,
    require_broadcastable,
    require_device,
    require_dtype,
    require_flag,
    require_integer,
    require_last_dim_contiguous,
    require_number,
    require_shape,
    require_tensor,
)
from fastgpt.ops.attention.call import Call, Packing
from fastgpt.ops.quantization import QUANTIZED_DTYPES

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 576  # of keys and of values, which may differ: 576 and 512, or 192 and 128 in MLA (arXiv 2405.04434)
TRITON_MAX_DIFFERENTIABLE_DIM = 256
# Kernels compute in fp32: the scale is finite there, and neither the soft cap nor its inverse is subnormal.
LARGEST_SCALE = torch.finfo(torch.float32).max
SOFTCAPS = 2.0**-126, 2.0**126


def check_call(call: Call) -> Call:
    """Returns the call with plain Python numbers; raises TypeError or ValueError that begins with the argument's name."""
    q, k, v, block_table = call.q, call.k, call.v, call.block_table
    require_tensor("q", q, 4)
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    B, H, T, D = q.shape
    _, H_kv, S, _ = k.shape
    D_v = v.shape[3]
    require_dtype("q", q, (*KERNEL_DTYPES, torch.float64))
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            got = f"{x.shape[3]} in shape {tuple(x.shape)}"
            raise ValueError(f"{name}: expected a head dim from 1 to {MAX_HEAD_DIM}, got {got}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"k: expected a number of heads that divides the {H} heads of q, got {H_kv}")
    require_dtype("k", k, (q.dtype, *QUANTIZED_DTYPES))
    require_dtype("v", v, (k.dtype,))
    first, layout, keys = B, "(B, H_kv, S", S
    tensors = {"k": k, "v": v}
    if block_table is not None:
        require_tensor("block_table", block_table, 2)
        require_dtype("block_table", block_table, (torch.int32,))
        require_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages)")
        first, layout, keys = k.shape[0], "(num_pages, H_kv, page", S * block_table.shape[1]
        tensors["block_table"] = block_table
    require_shape("k", k, (first, H_kv, S, D), f"{layout}, D) to match q")
    require_shape("v", v, (first, H_kv, S, D_v), f"{layout}, D_v) to match k")
    for name in ("k_scale", "v_scale"):
        x = getattr(call, name)
        if (x is None) == (k.dtype in QUANTIZED_DTYPES):
            wanted, got = ("a scale", "None") if x is None else ("None", "a scale")
            raise ValueError(f"{name}: expected {wanted} for k and v of {k.dtype}, got {got}")
        if x is not None:
            require_tensor(name, x, 3)
            require_dtype(name, x, (torch.float32,))
            require_shape(name, x, (first, H_kv, S), f"{layout}) to match k")
            tensors[name] = x
    for name, size, dtypes in (
        ("kv_lengths", B, (torch.int32,)),
        ("alibi_slopes", H, (torch.float32, q.dtype) if q.dtype == torch.float64 else (torch.float32,)),
        ("sinks", H, (*KERNEL_DTYPES, torch.float64)),
    ):
        x = getattr(call, name)
        if x is not None:
            require_tensor(name, x, 1)
            require_dtype(name, x, dtypes)
            require_shape(name, x, (size,), "(B,)" if name == "kv_lengths" else "(H,)")
            tensors[name] = x
    for name, dtypes in (("mask", (torch.bool,)), ("bias", (q.dtype, torch.float32))):
        x = getattr(call, name)
        if x is not None:
            require_tensor(name, x)
            require_dtype(name, x, dtypes)
            require_broadcastable(name, x, (B, H, T, keys), "(B, H, T, S)")
            tensors[name] = x
    for name, tensor in tensors.items():
        require_device(name, tensor, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_last_dim_contiguous(name, tensor)
    require_flag("causal", call.causal)
    if isinstance(call.dropout_seed, torch.Tensor):
        require_tensor("dropout_seed", call.dropout_seed)
        require_dtype("dropout_seed", call.dropout_seed, (torch.int64,))
        require_shape("dropout_seed", call.dropout_seed, (1,), "(1,)")
    else:
        require_integer("dropout_seed", call.dropout_seed, 0, 2**63 - 1, optional=True)
    return call._replace(
        scale=_float(require_number("scale", call.scale, -LARGEST_SCALE, LARGEST_SCALE, optional=True)),
        window=require_integer("window", call.window, 1, 2**63 - 1, optional=True),
        softcap=_float(require_number("softcap", call.softcap, *SOFTCAPS, optional=True)),
        dropout_p=_float(require_number("dropout_p", call.dropout_p, least=0, below=1)),
    )


def _float(number):
    return float(number) if isinstance(number, int) else number


def check_pages(k: torch.Tensor, block_table: torch.Tensor | None, kv_lengths: torch.Tensor | None) -> None:
    """On CPU, raises ValueError if a page that would be read is outside the pool."""
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


def packed_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> Call:
    """The checked call with q, k, v as (1, heads, total, head dim)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, 3)
    return check_call(Call(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), **options))


def check_packing(call: Call, packing: Packing) -> Packing:
    """Returns the packing with plain integers; raises TypeError or ValueError if it does not match the call."""
    packing = packing._replace(
        max_seqlen_q=require_integer("max_seqlen_q", packing.max_seqlen_q, 0, 2**63 - 1),
        max_seqlen_k=require_integer("max_seqlen_k", packing.max_seqlen_k, 0, 2**63 - 1),
    )
    require_tensor("cu_seqlens_q", packing.cu_seqlens_q, 1)
    for name, total in (("cu_seqlens_q", call.q.shape[2]), ("cu_seqlens_k", call.k.shape[2])):
        x = getattr(packing, name)
        require_tensor(name, x, 1)
        require_dtype(name, x, (torch.int32,))
        require_device(name, x, call.q.device)
        if x.shape != packing.cu_seqlens_q.shape or len(x) < 2:
            raise ValueError(f"{name}: expected shape (B + 1,), B >= 1, the same for q and k, got {tuple(x.shape)}")
        longest = packing.max_seqlen_q if name == "cu_seqlens_q" else packing.max_seqlen_k
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(x):
            lengths = x.diff()
            if x[0] != 0 or x[-1] != total or (lengths < 0).any():
                raise ValueError(f"{name}: expected numbers that ascend from 0 to {total}, got {x.tolist()}")
            if (needed := lengths.max().item()) > longest:  # as an int: one of 32 bits would wrap the other around
                limit = "max_seqlen_q" if name == "cu_seqlens_q" else "max_seqlen_k"
                raise ValueError(f"{limit}: expected at least {needed}, the longest sequence, got {longest}")
    return packing


def check_for_triton(call: Call, gradients: bool = False) -> Call:
    """`check_call`, which also raises ValueError for head dims that the Triton kernels do not support."""
    checked = check_call(call)
    if (reason := triton_refuses_head_dims(call.q, call.v, gradients)) is not None:
        raise ValueError(f"v: expected a head dim that the Triton kernels support, got shape {tuple(call.v.shape)}: {reason}")
    return checked


def triton_refuses_head_dims(q: torch.Tensor, v: torch.Tensor, gradients: bool) -> str | None:
    """Why the Triton kernels do not support these head dims (with gradients, if they are needed), or None."""
    D, D_v = q.shape[-1], v.shape[-1]
    if D_v > 512 and q.dtype is torch.float32:
        return f"it takes values of head dims up to 512 in fp32, and v has {D_v}"
    if gradients and max(D, D_v) > TRITON_MAX_DIFFERENTIABLE_DIM:
        return f"it has no backward for head dims above {TRITON_MAX_DIFFERENTIABLE_DIM}, and those are {D} and {D_v}"
    return None


def check_backward(call: Call, dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Checks the arguments of the backward operation: the forward call, and the gradients and results beside it."""
    check_for_triton(call, gradients=True)
    q, outputs = call.q, (*call.q.shape[:3], call.v.shape[3])
    for name, x, shape, meaning, dtype in (
        ("dout", dout, outputs, "(B, H, T, D_v) to match q and v", q.dtype),
        ("out", out, outputs, "(B, H, T, D_v)", q.dtype),
        ("lse", lse, tuple(q.shape[:3]), "(B, H, T)", torch.float32), ("dlse", dlse, tuple(q.shape[:3]), "(B, H, T)", None),
    ):  # fmt: skip
        if x is not None or name != "dlse":
            require_tensor(name, x)
            require_shape(name, x, shape, meaning)
            require_device(name, x, q.device)
            if dtype is not None:
                require_dtype(name, x, (dtype,))
            if x.dim() == 4:
                require_last_dim_contiguous(name, x)
