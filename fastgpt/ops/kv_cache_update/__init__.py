"""The KV-cache update, alone and fused with rotary embedding: contracts, and the choice of implementation."""

import torch

from fastgpt.checks import argument_error, require_flag
from fastgpt.ops.derivatives import derivatives_possible, derivatives_refused
from fastgpt.ops.implementations import choose, explain_call, require_impl
from fastgpt.ops.kv_cache_update import operators
from fastgpt.ops.kv_cache_update.checks import check_rope_slots, check_rope_update, check_slots, check_update
from fastgpt.ops.kv_cache_update.reference import (
    kv_cache_update_reference,
    rope_kv_cache_update_reference,
    rope_reference,
)
from fastgpt.ops.kv_cache_update.refusals import IMPLEMENTATIONS

__all__ = [
    "explain", "explain_rope", "kv_cache_update", "kv_cache_update_reference", "rope_kv_cache_update",
    "rope_kv_cache_update_reference", "rope_reference",
]  # fmt: skip

_kv_cache_update, _rope_kv_cache_update = operators.DEFAULT


def kv_cache_update(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Stores new keys and values in a KV cache, in place.

        k_cache[b,h,p] = k[b,h,t],  v_cache[b,h,p] = v[b,h,t],   p = positions[b,t], for every p >= 0

    Args:
        k: (B, H_kv, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        v: (B, H_kv, T, D_v), likewise.
        k_cache: (B, H_kv, S, D), or with a block table a pool of pages (num_pages, H_kv, page, D); dtype of k, or int8 or
            float8_e4m3fn; last dimension contiguous; written. Caches and scales must not overlap each other, themselves
            (as an expanded tensor does) or the inputs.
        v_cache: (B, H_kv, S, D_v) or (num_pages, H_kv, page, D_v); dtype of k_cache; written.
        positions: (B, T) int32|int64 on the device: the slot of each token, in tokens. A token with a negative position is
            skipped (padding). If several tokens have the same slot, the last token of the last sequence wins on a CPU and in
            the reference; on CUDA it is undefined which one does, or parts of which.
        block_table: (B, pages) int32 on the device. Token p of sequence b is in row p % page of page
            block_table[b, p // page]; S is then pages · page. Entries that no token of the call needs are not read.
        k_scale, v_scale: for int8 and float8_e4m3fn caches, (B, H_kv, S) or (num_pages, H_kv, page) fp32; written. A
            row x (one token and head) is stored as round(x · limit / max|x|), ties to even, with the scale
            max|x| / limit; limit is 127 for int8, 448 for float8_e4m3fn. A row with max|x| < 1e-30
            is stored as zeros; a row with an infinity or NaN gets the scale NaN. Head dims are then at most 1024.
        impl: "cpp" (CPU), "cuda" (CUDA C++, where the library was built), "triton" (CUDA) or "reference"; None picks the first
            that can serve the call; see `fastgpt.explain`.

    Returns: None. On CUDA it neither synchronizes nor allocates, so it can be captured in a CUDA graph. If k, v or a
        cache requires gradients, the reference serves the call with an in-place assignment that autograd records, and the
        caches keep the graph of k and v alive; call under torch.no_grad() to avoid that. 8-bit caches have no gradients.

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, impl; on CPU a position >= S, or a page
        outside the pool): argument, expected, got. Nothing is written then. On CUDA such a token is skipped without an
        error, which would need a device sync. ValueError also for gradients through an 8-bit cache.

    >>> k, v = torch.randn(2, 1, 2, 3, 64)  # three tokens
    >>> k_cache, v_cache = torch.zeros(2, 1, 2, 16, 64)
    >>> kv_cache_update(k, v, k_cache, v_cache, positions=torch.tensor([[0, 1, 2]]))
    >>> torch.equal(k_cache[:, :, :3], k)
    True
    """
    if impl is not None:
        require_impl(IMPLEMENTATIONS, impl)
    try:
        # The kernels check their arguments themselves, in a fraction of the time, before they write. On a CPU, choosing among
        # the implementations would take a quarter of the time of storing one token.
        if impl is None and not derivatives_possible() and k.is_cpu:
            operator = _kv_cache_update
        else:
            operator = _kernels_for("kv_cache_update", impl, k, v, k_cache, v_cache, k_scale, v_scale)[0]
        if operator is not None:
            return operator(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    except Exception as error:
        # Raises the error that names the argument.
        check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
        check_slots(positions, k_cache, block_table)
        if choose("kv_cache_update", IMPLEMENTATIONS, impl, k, v, k_cache, v_cache, k_scale, v_scale) != "reference":
            _raise_unless_negated(error, impl, k_cache, v_cache, k_scale, v_scale)
    kv_cache_update_reference(k, v, k_cache, v_cache, positions, block_table=block_table, k_scale=k_scale, v_scale=v_scale)


def rope_kv_cache_update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    interleaved: bool = False,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Applies rotary embedding to queries and keys, and stores keys and values in a KV cache, in one pass.

        (x[i], x[j]) becomes (x[i] cos - x[j] sin, x[j] cos + x[i] sin),  cos = cos[p,n], sin = sin[p,n],
        for the n-th pair (i, j) of the first R = 2 · cos.shape[1] dimensions; p = positions[b,t]

    Pairs are (n, n + R/2), or with `interleaved` (2n, 2n + 1). Dimensions from R on are not rotated. The rotation is computed
    in fp32 and rounded once.

    Args:
        q: (B, H, T, D) in the dtype of k, last dimension contiguous, other strides free.
        k, v, k_cache, v_cache, block_table, k_scale, v_scale: as in `kv_cache_update`; D <= 1024.
        positions: (B, T) int32|int64 on the device: the position of each token, which selects its angle, and its slot unless
            `slots` is given. A token with a negative position is not rotated (padding).
        cos, sin: (positions, R/2) fp32, rows contiguous; 2 <= R <= D.
        slots: (B, T) int32|int64 on the device: the slot of each token, if that is not its position (in a ring buffer).
            Negative: not stored.
        interleaved: whether pairs are adjacent dimensions.
        impl: "cpp" (CPU), "cuda" (CUDA C++, where the library was built), "triton" (CUDA) or "reference"; None picks the first
            that can serve the call; see `fastgpt.explain`.

    Returns: the rotated q, (B, H, T, D) contiguous. Gradients: as in `kv_cache_update`.
    Raises: as `kv_cache_update`; ValueError also for a position past the rows of cos (on CPU; on CUDA the token is then
        neither rotated nor stored).
    Source: RoFormer (arXiv 2104.09864); `interleaved=False` is the order of GPT-NeoX and Llama.
    """
    if type(interleaved) is not bool:  # PyTorch's dispatcher would take None
        require_flag("interleaved", interleaved)
    if impl is not None:
        require_impl(IMPLEMENTATIONS, impl)
    try:
        if impl is None and not derivatives_possible() and k.is_cpu:
            operator = _rope_kv_cache_update
        else:
            operator = _kernels_for("rope_kv_cache_update", impl, k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin)[1]
        if operator is not None:
            return operator(q, k, v, k_cache, v_cache, positions, cos, sin, slots, interleaved, block_table, k_scale, v_scale)
    except Exception as error:
        check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
        check_rope_slots(k_cache, positions, cos, slots, block_table)
        tensors = k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin
        if choose("rope_kv_cache_update", IMPLEMENTATIONS, impl, *tensors) != "reference":
            _raise_unless_negated(error, impl, k_cache, v_cache, k_scale, v_scale)
    return rope_kv_cache_update_reference(
        q, k, v, k_cache, v_cache, positions, cos, sin, slots=slots, interleaved=interleaved,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _kernels_for(operation: str, impl: str | None, k, *others):
    """The registered operations (kv_cache_update, rope_kv_cache_update) that serve a call, or (None, None) if the reference
    does. Raises ValueError for an impl that cannot serve it."""
    if impl is None and not k.is_cuda:
        served = not derivatives_possible() or derivatives_refused(k, *others) is None
        return operators.DEFAULT if served else (None, None)
    chosen = choose(operation, IMPLEMENTATIONS, impl, k, *others)
    if chosen == "triton":
        return operators.TRITON
    return (None, None) if chosen == "reference" else operators.DEFAULT


def _raise_unless_negated(error: Exception, impl: str | None, k_cache, v_cache, k_scale, v_scale) -> None:
    """Raises the error of a kernel, unless the reference can serve the call: a cache is a view with PyTorch's lazy negation
    (such as the imaginary part of a conjugate), which kernels cannot write to."""
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and x.is_neg():
            if impl is None:
                return
            raise ValueError(f"{name}: expected a tensor without lazy negation for impl {impl!r}, got is_neg() True") from error
    raise argument_error(error)


def explain(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> dict[str, str]:
    """Implementation -> "chosen", "available", or why it refuses this call."""
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    return explain_call(IMPLEMENTATIONS, k, v, k_cache, v_cache, k_scale, v_scale, impl=impl)


def explain_rope(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, *, slots: torch.Tensor | None = None, interleaved: bool = False,
    block_table: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
    impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """`explain` for rope_kv_cache_update."""
    require_flag("interleaved", interleaved)
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    return explain_call(IMPLEMENTATIONS, k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin, impl=impl)
