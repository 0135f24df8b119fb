"""The KV-cache update and rotary embedding in plain PyTorch."""

import torch
import torch.nn.functional as F

from fastgpt.checks import require_flag, require_no_overlap
from fastgpt.ops.derivatives import derivatives_refused, transforms_active
from fastgpt.ops.kv_cache_update.checks import check_rope_slots, check_rope_update, check_slots, check_update
from fastgpt.ops.quantization import QUANTIZED_DTYPES, quantize

# How a view was made decides whether autograd allows an in-place write to it. PyTorch has no public name for this; where a
# version lacks it, the write itself raises PyTorch's error.
_made_by = getattr(torch._C._autograd, "_get_creation_meta", None)


def kv_cache_update_reference(
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
    """The reference for `fastgpt.kv_cache_update` in plain PyTorch: on every device, in every float dtype, differentiable except
    for 8-bit caches. It takes the same arguments and ignores impl.

        k_cache[b,h,p] = k[b,h,t],  v_cache[b,h,p] = v[b,h,t],   p = positions[b,t], for every p >= 0

    Raises: TypeError, ValueError as `fastgpt.kv_cache_update`.
    """
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    check_slots(positions, k_cache, block_table)
    _store(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def rope_kv_cache_update_reference(
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
    """The reference for `fastgpt.rope_kv_cache_update` in plain PyTorch: `rope_reference` of q and k, then
    `kv_cache_update_reference`. On every device, in every float dtype, differentiable except for 8-bit caches. It takes the
    same arguments and ignores impl.

    Returns: the rotated q, (B, H, T, D).
    Raises: TypeError, ValueError as `fastgpt.rope_kv_cache_update`.
    """
    require_flag("interleaved", interleaved)
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    check_rope_slots(k_cache, positions, cos, slots, block_table)
    slots = positions if slots is None else slots
    slots = slots.masked_fill(positions >= cos.shape[0], -1)
    k = rope_reference(k, positions, cos, sin, interleaved=interleaved)
    _store(k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale)
    return rope_reference(q, positions, cos, sin, interleaved=interleaved)


def rope_reference(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotary embedding of x (B, H, T, D) as in `rope_kv_cache_update`, in a new tensor; on every device, differentiable.

    Tokens at negative positions, or past the rows of cos, are not rotated.
    """
    pairs = cos.shape[1]
    index = positions.clamp(0, cos.shape[0] - 1).long()
    c, s = F.embedding(index, cos).unsqueeze(1), F.embedding(index, sin).unsqueeze(1)  # (B, 1, T, R/2)
    rotary, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    rotary = rotary.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        a, b = rotary.unflatten(-1, (pairs, 2)).unbind(-1)
        rotary = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
    else:
        a, b = rotary.split(pairs, dim=-1)
        rotary = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    rotated = torch.cat([rotary.to(x.dtype), rest], dim=-1)
    return torch.where(((positions >= 0) & (positions < cos.shape[0])).unsqueeze(1).unsqueeze(-1), rotated, x)


def _store(k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale):
    if k_cache.dtype in QUANTIZED_DTYPES and derivatives_refused(k, v, k_scale, v_scale) is not None:
        raise ValueError(
            f"k_cache: expected the dtype of k when gradients are required, since quantization has none, got "
            f"{k_cache.dtype}; call under torch.no_grad(), or with k.detach() and v.detach()"
        )
    for name, x, source in (
        ("k_cache", k_cache, k), ("v_cache", v_cache, v), ("k_scale", k_scale, k), ("v_scale", v_scale, v)
    ):  # fmt: skip
        if x is not None:
            require_no_overlap(name, x)
            _require_writable(name, x, source)
    if slots.is_meta:
        return
    b, t, index, n = _slots_of(slots, k_cache, block_table)
    stored = []
    for name, x, cache, scale in (("k", k, k_cache, k_scale), ("v", v, v_cache, v_scale)):
        # Tokens before heads, since vmap supports indexing of leading dimensions only.
        rows = x.transpose(1, 2)[b, t]  # (tokens, H_kv, head dim)
        if cache.dtype in QUANTIZED_DTYPES:
            rows, scales = quantize(rows, cache.dtype)
            stored.append((f"{name}_scale", scale, scales))
        if cache.dtype == torch.float8_e4m3fn:  # PyTorch has no indexed assignment for it
            rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
        stored.append((f"{name}_cache", cache, rows))
    # A transform of torch.func may refuse the second write after the first was made: both are tried with no tokens first.
    for tokens in (slice(0), slice(None)) if transforms_active() else (slice(None),):
        for name, target, rows in stored:
            try:
                target.transpose(1, 2)[index[tokens], n[tokens]] = rows[tokens]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"{name}: expected a tensor that allows in-place writes, got: {error}") from error


def _require_writable(name: str, x: torch.Tensor, source: torch.Tensor) -> None:
    """Raises ValueError if autograd does not allow in-place writes to x."""
    if not torch.is_grad_enabled() or not (x.requires_grad or source.requires_grad):
        return
    got = None
    if x.requires_grad and (x.is_leaf or x._is_view() and x._base.is_leaf):
        got = "a leaf that requires gradients, or a view of one"
    elif x.is_inference() and not torch.is_inference_mode_enabled():
        got = "a tensor made in inference mode"
    elif _made_by is not None and not torch.compiler.is_compiling() and x._is_view() and (how := _made_by(x).name) != "DEFAULT":
        got = "one of several views made by unpacking, unbind or split" if how == "MULTI_OUTPUT_NODE" else (
            "a view made under torch.no_grad(), in inference mode or in a custom function"
        )  # fmt: skip
    if got is not None:
        raise ValueError(
            f"{name}: expected a tensor that autograd allows in-place writes to, got {got}; call under torch.no_grad(), or pass "
            "a clone"
        )


def _slots_of(positions, k_cache, block_table):
    """Of the stored tokens: sequences b, tokens t, and the slots in the cache, as indices into dimensions 0 and 2."""
    rows = k_cache.shape[2]
    capacity = rows if block_table is None else rows * block_table.shape[1]
    valid = (positions >= 0) & (positions < capacity)
    if block_table is None:
        b, t = valid.nonzero(as_tuple=True)
        return _last_of_each_slot(b, t, b, positions[b, t].long(), rows)
    index = positions.clamp(0, max(capacity - 1, 0)).long() // max(rows, 1)
    pages = block_table.long().gather(1, index) if capacity else torch.full_like(index, -1)  # (B, T)
    b, t = (valid & (pages >= 0) & (pages < k_cache.shape[0])).nonzero(as_tuple=True)
    return _last_of_each_slot(b, t, pages[b, t], positions[b, t].long() % max(rows, 1), rows)


def _last_of_each_slot(b, t, index, n, rows):
    """Drops tokens whose slot a later token gets too, since an indexed assignment stores duplicates in any order."""
    _, slot = torch.unique(index * rows + n, return_inverse=True)
    order = torch.arange(len(slot), device=slot.device)
    last = torch.zeros_like(order).scatter_reduce(0, slot, order, "amax", include_self=False)
    is_last = last[slot] == order
    return b[is_last], t[is_last], index[is_last], n[is_last]
