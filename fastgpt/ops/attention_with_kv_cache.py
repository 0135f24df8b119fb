"""KV-cache update and attention in one operation: contract, reference, choice of implementation.

On a GPU, a decode step of a small model is bound by the number of kernel launches. Rotary embedding, cache update and attention
for one token of each sequence are a single launch here.
"""

import math

import torch
from torch.compiler import is_compiling

from fastgpt.checks import require_device, require_dtype, require_flag, require_tensor
from fastgpt.ops import attention as attending
from fastgpt.ops import kv_cache_update as updating
from fastgpt.ops.attention import attention, attention_reference
from fastgpt.ops.attention.call import Call
from fastgpt.ops.attention.checks import check_call, check_pages, triton_refuses_head_dims
from fastgpt.ops.attention.operators import attention_check
from fastgpt.ops.attention.refusals import triton_refuses
from fastgpt.ops.derivatives import derivatives_refused
from fastgpt.ops.implementations import choose, explain_call, runs_elsewhere
from fastgpt.ops.kv_cache_update import (
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.ops.kv_cache_update.checks import check_rope_update, check_update
from fastgpt.ops.library import library, without_autograd


def attention_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    slots: torch.Tensor | None = None,
    interleaved: bool = False,
    kv_lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Applies rotary embedding, stores new keys and values in a KV cache, and computes attention over the cache.

        q = rope_kv_cache_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots=slots, ...)
        out = attention(q, k_cache, v_cache, kv_lengths=kv_lengths, ...)

    Without cos and sin, the first line is kv_cache_update.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free: q, k and v may be views of the output
            of one projection. fp64 too, which only the reference serves.
        k: (B, H_kv, T, D) in the dtype of q, likewise; H must be a multiple of H_kv.
        v: (B, H_kv, T, D_v) in the dtype of q, likewise.
        k_cache, v_cache, block_table, k_scale, v_scale: as in `kv_cache_update`; caches and scales are written. No sequence
            may attend to a slot that this call writes for another sequence.
        positions, cos, sin, slots, interleaved: as in `rope_kv_cache_update`. Without cos and sin, slots take the place of
            positions, if given.
        kv_lengths: (B,) int32 on the device: the number of keys of each sequence, new tokens included; default: the capacity.
        counters: int32 zeros on the device, B · H_kv · (1 + capacity / 4096) of them, by which the programs of the Triton
            kernel find out which of them finishes last; they are zero again afterwards. No other call may use them at the same
            time. If they are too few, or None, the call allocates some, which takes another launch.
        causal, scale, window, softcap, alibi_slopes, sinks, bias, return_lse: as in `attention`.
        impl: "triton" (CUDA, T = 1, no bias, one launch), "unfused" (the two operations in turn, each by the implementation that
            serves it) or "reference"; None picks the first that can serve the call; see `fastgpt.explain`.

    Returns: out (B, H, T, D_v) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) fp32, natural log. All
        implementations store the same bits; out agrees within the numerics contract. On CUDA it does not synchronize, so it
        can be captured in a CUDA graph. Gradients are those of the two operations.

    Raises: TypeError, ValueError as the two operations. On CUDA a token with a position or page out of range is not stored,
        without an error.
    Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
    """
    require_tensor("q", q, 4)
    call = Call(
        q, k_cache, v_cache, causal, scale, window, softcap, alibi_slopes, sinks, bias=bias, kv_lengths=kv_lengths,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    new = (k, v, positions, cos, sin, slots, interleaved)
    chosen = choose("attention_with_kv_cache", IMPLEMENTATIONS, impl, call, new) if q.is_cuda or impl is not None else "unfused"
    # Kernels and launchers check the rest; PyTorch's dispatcher would convert these types.
    plain = (
        type(causal) is type(interleaved) is type(return_lse) is bool and (scale is None or type(scale) is float)
        and (window is None or type(window) is int) and (softcap is None or type(softcap) is float)
    )  # fmt: skip
    if chosen != "triton":
        # The update checks its own arguments; those of attention are checked before it writes.
        if not (plain and counters is None and _is_accepted(call)):
            call = _check_reading(call, interleaved, counters, return_lse)
        return _unfused(call, new, return_lse, "reference" if chosen == "reference" else None)
    if not plain:
        call = _check(call, new, counters, return_lse)
    try:
        out, lse = _attention_with_kv_cache(
            q, k, v, k_cache, v_cache, positions if slots is None else slots, counters, causal,
            1.0 / math.sqrt(q.shape[-1]) if scale is None else call.scale, None if cos is None else positions, cos, sin,
            interleaved, kv_lengths, block_table, k_scale, v_scale, call.window, call.softcap, alibi_slopes, sinks,
        )  # fmt: skip
    except Exception:
        _check(call, new, counters, return_lse)  # raises the error that names the argument
        raise
    return (out, lse) if return_lse else out


def attention_with_kv_cache_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    slots: torch.Tensor | None = None,
    interleaved: bool = False,
    kv_lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The reference for `fastgpt.attention_with_kv_cache` in plain PyTorch: `rope_kv_cache_update_reference` or
    `kv_cache_update_reference`, then `attention_reference`. On every device, in every float dtype. It takes the same arguments
    and ignores impl and counters.

    Returns: out (B, H, T, D_v) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) in at least fp32.
    Raises: TypeError, ValueError as `fastgpt.attention_with_kv_cache`.
    """
    call = Call(
        q, k_cache, v_cache, causal, scale, window, softcap, alibi_slopes, sinks, bias=bias, kv_lengths=kv_lengths,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    _check(call, (k, v, positions, cos, sin, slots, interleaved), counters, return_lse)
    check_pages(k_cache, block_table, kv_lengths)
    cache = {"block_table": block_table, "k_scale": k_scale, "v_scale": v_scale}
    if cos is None and sin is None:
        kv_cache_update_reference(k, v, k_cache, v_cache, positions if slots is None else slots, **cache)
    else:
        q = rope_kv_cache_update_reference(
            q, k, v, k_cache, v_cache, positions, cos, sin, slots=slots, interleaved=interleaved, **cache
        )
    return attention_reference(
        q, k_cache, v_cache, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, bias=bias, kv_lengths=kv_lengths, **cache, return_lse=return_lse,
    )  # fmt: skip


def _unfused(call: Call, new: tuple, return_lse: bool, impl: str | None):
    k, v, positions, cos, sin, slots, interleaved = new
    cache = {"block_table": call.block_table, "k_scale": call.k_scale, "v_scale": call.v_scale, "impl": impl}
    if cos is None and sin is None:
        kv_cache_update(k, v, call.k, call.v, positions if slots is None else slots, **cache)
    else:
        q = rope_kv_cache_update(
            call.q, k, v, call.k, call.v, positions, cos, sin, slots=slots, interleaved=interleaved, **cache
        )
        call = call._replace(q=q)
    return attention(**call._asdict(), return_lse=return_lse, impl=impl)


def _is_accepted(call: Call) -> bool:
    """Whether the C++ kernel accepts the call by its own checks, which are faster than those in Python."""
    if is_compiling() or not call.q.is_cpu or call.bias is not None:
        return False
    scale = 1.0 if call.scale is None else call.scale
    try:
        attention_check(*call[:3], call.causal, scale, *call[5:9], *call[11:15])
    except Exception:
        return False
    return True


def _check_reading(call: Call, interleaved, counters, return_lse) -> Call:
    """Checks all arguments but those of the update."""
    require_flag("interleaved", interleaved)
    require_flag("return_lse", return_lse)
    call = check_call(call)
    if counters is not None:
        require_tensor("counters", counters)
        require_dtype("counters", counters, (torch.int32,))
        require_device("counters", counters, call.q.device)
        if not counters.is_contiguous():
            raise ValueError(f"counters: expected a contiguous tensor, got strides {counters.stride()}")
    return call


def _check(call: Call, new: tuple, counters, return_lse) -> Call:
    k, v, positions, cos, sin, slots, interleaved = new
    if cos is None and sin is None:
        name, stored = ("positions", positions) if slots is None else ("slots", slots)
        check_update(k, v, call.k, call.v, stored, call.block_table, call.k_scale, call.v_scale, name)
    else:
        check_rope_update(
            call.q, k, v, call.k, call.v, positions, cos, sin, slots, call.block_table, call.k_scale, call.v_scale
        )
    return _check_reading(call, interleaved, counters, return_lse)


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None, *, slots: torch.Tensor | None = None,
    interleaved: bool = False, kv_lengths: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None, counters: torch.Tensor | None = None,
    return_lse: bool = False, impl: str | None = None, **options,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = Call(
        q, k_cache, v_cache, kv_lengths=kv_lengths, block_table=block_table, k_scale=k_scale, v_scale=v_scale, **options
    )
    new = (k, v, positions, cos, sin, slots, interleaved)
    _check(call, new, counters, return_lse)
    return explain_call(IMPLEMENTATIONS, call, new, impl=impl)


def waits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    **options,
) -> str | None:
    """Why this call (without gradients) cannot be captured in a CUDA graph, or None: references wait for the device.

    Arguments: those of `attention_with_kv_cache`.
    """
    reasons = explain(q, k, v, k_cache, v_cache, positions, cos, sin, **options)
    if reasons["triton"] == "chosen":
        return None
    cache = {name: options.get(name) for name in ("block_table", "k_scale", "v_scale")}
    parts = {
        "kv_cache_update": updating.explain(k, v, k_cache, v_cache, positions, **cache),
        "attention": attending.explain(q, k_cache, v_cache, **cache),
    }
    for operation, reasons in parts.items():
        if reasons["reference"] == "chosen":
            others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if name != "reference")
            return f"{operation} would be served by its reference, which waits for the device ({others})"
    return None


def _triton_refuses(call: Call, new: tuple):
    if not call.q.is_cuda:
        return runs_elsewhere("CUDA", "q", call.q.device)
    if (reason := triton_refuses(call)) is not None:
        return reason
    if call.q.dim() == 4 and call.q.shape[2] != 1:
        return f"it takes one token of each sequence, and q has {call.q.shape[2]}"
    if call.bias is not None:
        return "it takes no bias"
    k, v, _, cos, sin, _, _ = new
    if (reason := derivatives_refused(call.q, k, v, call.k, call.v, cos, sin, call.sinks)) is not None:
        return reason
    if torch.compiler.is_compiling() or type(call.k) is not torch.Tensor or type(call.v) is not torch.Tensor:
        return None  # traced tensors have no address; the operation itself checks it
    return None if _rows_are_aligned(call.k, call.v) else "it takes caches whose rows start and end at multiples of 16 bytes"


def _rows_are_aligned(k_cache, v_cache) -> bool:
    from fastgpt.kernels.attention_rows import has_aligned_rows  # Triton is imported only when a CUDA tensor needs it

    return has_aligned_rows(k_cache) and has_aligned_rows(v_cache)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"triton": _triton_refuses, "unfused": lambda call, new: None, "reference": lambda call, new: None}


library.define(
    "attention_with_kv_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "Tensor(c!)? counters, bool causal, float scale, Tensor? positions=None, Tensor? cos=None, Tensor? sin=None, "
    "bool interleaved=False, Tensor? kv_lengths=None, Tensor? block_table=None, Tensor(d!)? k_scale=None, "
    "Tensor(e!)? v_scale=None, SymInt? window=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None) -> (Tensor, Tensor)"
)
_attention_with_kv_cache = without_autograd(torch.ops.fastgpt.attention_with_kv_cache.default)


@torch.library.register_fake("fastgpt::attention_with_kv_cache", lib=library)
def _attention_with_kv_cache_fake(q, k, v, k_cache, v_cache, slots, counters, causal, scale, *rotation_and_options):
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v_cache.shape[3]).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def _attention_with_kv_cache_triton(
    q, k, v, k_cache, v_cache, slots, counters, causal, scale, positions=None, cos=None, sin=None, interleaved=False,
    kv_lengths=None, block_table=None, k_scale=None, v_scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None,
):  # fmt: skip
    call = Call(
        q, k_cache, v_cache, causal, scale, window, softcap, alibi_slopes, sinks, kv_lengths=kv_lengths,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    rotated = cos is not None or sin is not None
    if rotated and positions is None:
        raise ValueError("positions: expected a tensor, of tokens that are rotated, got None")
    _check(call, (k, v, positions if rotated else slots, cos, sin, slots, interleaved), counters, False)
    if q.shape[2] != 1:
        raise ValueError(f"q: expected one token of each sequence, got shape {tuple(q.shape)}")
    if triton_refuses_head_dims(q, v_cache, False) or not _rows_are_aligned(k_cache, v_cache):
        # Called through torch.ops, or compiled without knowing addresses.
        return _attention_with_kv_cache_unfused(
            q, k, v, k_cache, v_cache, slots, counters, causal, scale, positions, cos, sin, interleaved, kv_lengths,
            block_table, k_scale, v_scale, window, softcap, alibi_slopes, sinks,
        )  # fmt: skip
    from fastgpt.kernels.attention_decode import NewToken, attention_decode

    return attention_decode(
        q, k_cache, v_cache, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, kv_lengths=kv_lengths, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
        new=NewToken(k, v, slots, positions, cos, sin, interleaved), counters=counters,
    )  # fmt: skip


def _attention_with_kv_cache_unfused(
    q, k, v, k_cache, v_cache, slots, counters, causal, scale, positions=None, cos=None, sin=None, interleaved=False,
    kv_lengths=None, block_table=None, k_scale=None, v_scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None,
):  # fmt: skip
    """The registered operation on a CPU. `attention_with_kv_cache` itself calls the two operations directly."""
    call = Call(
        q, k_cache, v_cache, causal, scale, window, softcap, alibi_slopes, sinks, kv_lengths=kv_lengths,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    new = (k, v, slots if positions is None else positions, cos, sin, slots, interleaved)
    return _unfused(call, new, True, None)


library.impl("attention_with_kv_cache", _attention_with_kv_cache_triton, "CUDA")
library.impl("attention_with_kv_cache", _attention_with_kv_cache_unfused, "CPU")
