"""The KV-cache update, alone and fused with rotary embedding: contract, checks, reference, dispatch to the kernels."""

import functools

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    argument_error,
    require_apart,
    require_device,
    require_dtype,
    require_flag,
    require_last_dim_contiguous,
    require_shape,
    require_tensor,
)
from fastgpt.ops.derivatives import derivatives_possible, derivatives_refused, transforms_active
from fastgpt.ops.implementations import choose, explain_call, require_impl, runs_elsewhere, triton_unusable
from fastgpt.ops.library import CUDA_MISSING, library, without_autograd
from fastgpt.ops.quantization import QUANTIZED_DTYPES, quantize

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TRANSFORMED_DIM = 1024
# How a view was made, which decides whether autograd lets it be written to. PyTorch has no public name for it: where another
# version has none at all, the write itself is refused, with PyTorch's words.
_made_by = getattr(torch._C._autograd, "_get_creation_meta", None)


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
    """Stores new keys and values into a cache, in place.

        k_cache[b,h,p] = k[b,h,t],  v_cache[b,h,p] = v[b,h,t],   p = positions[b,t], for every p >= 0

    Args:
        k: (B, H_kv, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        v: (B, H_kv, T, D_v), likewise.
        k_cache, v_cache: (B, H_kv, S, D) and (B, H_kv, S, D_v), or with a block table pools of pages (num_pages, H_kv, page, D)
            and (num_pages, H_kv, page, D_v); dtype of k, or int8 or float8_e4m3fn; strides likewise; written. No two of their
            numbers, nor of the scales', may share memory, nor be read by the call.
        positions: (B, T) int32|int64 on the device: the slot of each token, in tokens. Negative skips the token
            (padding). Where two tokens name the same slot, the last one of the last sequence stays on a CPU and in the
            reference; in the kernels of a GPU any may, or parts of several.
        block_table: (B, pages) int32 on the device. Token p of sequence b lies in row p % page of page
            block_table[b, p // page]; S is then pages · page. Entries that no token of the call needs may be anything.
        k_scale, v_scale: for int8 and float8_e4m3fn caches, (B, H_kv, S) or (num_pages, H_kv, page) fp32; written. A
            row x (the numbers of a token and head) is stored as round(x · limit / max|x|), ties to even, with the scale
            max|x| / limit that restores it; limit is 127 for int8, 448 for float8_e4m3fn. A row with max|x| < 1e-30
            is zero; a row that holds infinity or NaN gets scale NaN. Head dims are then at most 1024.
        impl: "cpp" (CPU), "cuda" (CUDA C++, where the library was built), "triton" (CUDA) or "reference"; None picks the first
            that can serve the call; see `fastgpt.explain`.

    Returns None. Under CUDA it neither synchronizes nor allocates, so it can be captured in a CUDA graph. Where k, v or a
    cache asks for derivatives, the reference serves the call: an assignment in place, as autograd knows it. Then the caches
    hold on to what k and v were computed from; call under torch.no_grad() to cut that. 8-bit caches carry none.

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, impl; on CPU a position >= S, or a page
        outside the pool): argument, expected, got. Nothing is written then. On CUDA such a token is not stored and not
        reported: telling would need a synchronization. ValueError also for derivatives through an 8-bit cache.
    """
    if impl is not None:
        require_impl(IMPLEMENTATIONS, impl)
    try:
        # The kernels check for themselves, in a fraction of the time, before they write. On a CPU even the choice shows.
        if impl is None and not derivatives_possible() and k.is_cpu:
            operator = _kv_cache_update
        else:
            operator = _operators("kv_cache_update", impl, k, v, k_cache, v_cache, k_scale, v_scale)[0]
        if operator is not None:
            return operator(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    except Exception as error:
        check_update(
            k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale
        )  # raises the error that names the argument
        _check_slots(positions, k_cache, block_table)
        if choose("kv_cache_update", IMPLEMENTATIONS, impl, k, v, k_cache, v_cache, k_scale, v_scale) != "reference":
            _raise_unless_negated(error, impl, k_cache, v_cache, k_scale, v_scale)
    kv_cache_update_reference(k, v, k_cache, v_cache, positions, block_table=block_table, k_scale=k_scale, v_scale=v_scale)


def _operators(operation: str, impl: str | None, k, *others):
    """The registered operations, kv_cache_update and rope_kv_cache_update, of the kernels that serve a call; None where the
    reference does. Raises ValueError for an impl that cannot."""
    if impl is None and not k.is_cuda:
        served = not derivatives_possible() or derivatives_refused(k, *others) is None
        return (_kv_cache_update, _rope_kv_cache_update) if served else (None, None)
    chosen = choose(operation, IMPLEMENTATIONS, impl, k, *others)
    if chosen == "triton":
        return _with_triton
    return (None, None) if chosen == "reference" else (_kv_cache_update, _rope_kv_cache_update)


def _raise_unless_negated(error: Exception, impl: str | None, k_cache, v_cache, k_scale, v_scale) -> None:
    """Returns where the reference can serve what the kernels cannot: PyTorch writes for them to one view that stands for what
    lies in memory negated, the imaginary part of a conjugate say, but not to several."""
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and x.is_neg():
            if impl is None:
                return
            raise ValueError(f"{name}: expected its numbers in memory with impl {impl!r}, got a view that negates") from error
    raise argument_error(error)


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
    """The same function in plain PyTorch, on every device; differentiable, but for 8-bit caches, which it then refuses."""
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    _check_slots(positions, k_cache, block_table)
    _store(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def _store(k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale):
    if k_cache.dtype in QUANTIZED_DTYPES and derivatives_refused(k, v, k_scale, v_scale) is not None:
        raise ValueError(
            f"k_cache: expected the dtype of k where derivatives are asked for, since rounding to 8 bits has none, got "
            f"{k_cache.dtype}; call under torch.no_grad(), or with k.detach() and v.detach()"
        )
    for name, x, source in (
        ("k_cache", k_cache, k), ("v_cache", v_cache, v), ("k_scale", k_scale, k), ("v_scale", v_scale, v)
    ):  # fmt: skip
        if x is not None:
            require_apart(name, x)
            _require_writable(name, x, source)
    if slots.is_meta:
        return
    b, t, index, n = _slots_of(slots, k_cache, block_table)
    stored = []
    for name, x, cache, scale in (("k", k, k_cache, k_scale), ("v", v, v_cache, v_scale)):
        # Tokens before heads, so that what is indexed comes first: vmap takes no other index.
        rows = x.transpose(1, 2)[b, t]  # (tokens, H_kv, head dim)
        if cache.dtype in QUANTIZED_DTYPES:
            rows, scales = quantize(rows, cache.dtype)
            stored.append((f"{name}_scale", scale, scales))
        if cache.dtype == torch.float8_e4m3fn:  # for which PyTorch has no indexed assignment
            rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
        stored.append((f"{name}_cache", cache, rows))
    # A transform of torch.func may refuse the second after the first: it is asked about both with no tokens.
    for tokens in (slice(0), slice(None)) if transforms_active() else (slice(None),):
        for name, target, rows in stored:
            try:  # a view made now, of a base that the write before may have been to
                target.transpose(1, 2)[index[tokens], n[tokens]] = rows[tokens]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"{name}: expected a tensor that can be written to, which PyTorch refuses: {error}") from error


def _require_writable(name: str, x: torch.Tensor, source: torch.Tensor) -> None:
    """Raises ValueError where autograd does not let x be written to in place."""
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
            f"{name}: expected a tensor that autograd lets be written in place, got {got}; call under torch.no_grad(), or with "
            "its clone"
        )


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
    """Rotates queries and keys by their positions, and stores keys and values into a cache, in one pass.

        (x[i], x[j]) becomes (x[i] cos - x[j] sin, x[j] cos + x[i] sin),  cos = cos[p,n], sin = sin[p,n],
        for the n-th pair (i, j) of the first R = 2 · cos.shape[1] dimensions; p = positions[b,t]

    Pairs are (n, n + R/2), or with `interleaved` (2n, 2n + 1). Dimensions from R on stay as they are.

    Args:
        q: (B, H, T, D) in the dtype of k, last dimension contiguous, other strides free.
        k, v, k_cache, v_cache, block_table, k_scale, v_scale, impl: as in `kv_cache_update`; D <= 1024.
        positions: (B, T) int32|int64 on the device: angle and slot of each token. Negative: not rotated (padding).
        cos, sin: (positions, R/2) fp32, rows contiguous; 2 <= R <= D. Computed in fp32 and rounded once to q's dtype.
        slots: (B, T) like positions: where to store tokens, if not at their positions: in a ring, say. Negative: not
            stored.

    Returns: the rotated q, (B, H, T, D) contiguous. Derivatives: as `kv_cache_update`.
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
            operator = _operators("rope_kv_cache_update", impl, k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin)[1]
        if operator is not None:
            return operator(q, k, v, k_cache, v_cache, positions, cos, sin, slots, interleaved, block_table, k_scale, v_scale)
    except Exception as error:
        check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
        _check_rope_slots(k_cache, positions, cos, slots, block_table)
        if (
            choose("rope_kv_cache_update", IMPLEMENTATIONS, impl, k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin)
            != "reference"
        ):
            _raise_unless_negated(error, impl, k_cache, v_cache, k_scale, v_scale)
    return rope_kv_cache_update_reference(
        q, k, v, k_cache, v_cache, positions, cos, sin, slots=slots, interleaved=interleaved,
        block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


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
    """The same function in plain PyTorch, on every device: `rope_reference`, then `kv_cache_update_reference`."""
    require_flag("interleaved", interleaved)
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    _check_rope_slots(k_cache, positions, cos, slots, block_table)
    slots = positions if slots is None else slots
    slots = slots.masked_fill(positions >= cos.shape[0], -1)
    k = rope_reference(k, positions, cos, sin, interleaved=interleaved)
    _store(k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale)
    return rope_reference(q, positions, cos, sin, interleaved=interleaved)


def rope_reference(x, positions, cos, sin, *, interleaved=False):
    """x (B, H, T, D), rotated as in `rope_kv_cache_update`; on every device, differentiable. Returns a new tensor.

    Tokens at positions that are negative, or past the rows of cos, are not rotated.
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


def _slots_of(positions, k_cache, block_table):
    """Of the tokens that are stored: sequence b, token t, and the first and third index of their slot in the cache."""
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
    """Without the tokens whose slots others after them get, which an indexed assignment would store in any order."""
    _, slot = torch.unique(index * rows + n, return_inverse=True)
    order = torch.arange(len(slot), device=slot.device)
    last = torch.zeros_like(order).scatter_reduce(0, slot, order, "amax", include_self=False)
    kept = last[slot] == order
    return b[kept], t[kept], index[kept], n[kept]


def check_update(k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale, slots_name="positions"):
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    require_tensor("k_cache", k_cache, 4)
    require_tensor("v_cache", v_cache, 4)
    require_tensor(slots_name, slots, 2)
    B, H_kv, T, D = k.shape
    S = k_cache.shape[2]
    require_dtype("k", k, (*KERNEL_DTYPES, torch.float64))
    require_dtype("v", v, (k.dtype,))
    require_dtype("k_cache", k_cache, (k.dtype, *QUANTIZED_DTYPES))
    require_dtype("v_cache", v_cache, (k_cache.dtype,))
    require_dtype(slots_name, slots, (torch.int32, torch.int64))
    D_v = v.shape[3]
    require_shape("v", v, (B, H_kv, T, D_v), "(B, H_kv, T, D_v) to match k")
    require_shape(slots_name, slots, (B, T), "(B, T)")
    tensors = {"v": v, "k_cache": k_cache, "v_cache": v_cache, slots_name: slots}
    if block_table is None:
        first, layout = B, "(B, H_kv, S"
    else:
        require_tensor("block_table", block_table, 2)
        require_dtype("block_table", block_table, (torch.int32,))
        require_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages)")
        first, layout = k_cache.shape[0], "(num_pages, H_kv, page"
        tensors["block_table"] = block_table
    require_shape("k_cache", k_cache, (first, H_kv, S, D), f"{layout}, D) to match k")
    require_shape("v_cache", v_cache, (first, H_kv, S, D_v), f"{layout}, D_v) to match k_cache and v")
    for name, scale, x in (("k_scale", k_scale, k), ("v_scale", v_scale, v)):
        if k_cache.dtype not in QUANTIZED_DTYPES:
            if scale is not None:
                raise ValueError(f"{name}: expected None for a cache of {k_cache.dtype}, got a scale")
            continue
        if scale is None:
            raise ValueError(f"{name}: expected a scale for a cache of {k_cache.dtype}, got None")
        require_tensor(name, scale, 3)
        require_dtype(name, scale, (torch.float32,))
        require_shape(name, scale, (first, H_kv, S), f"{layout}) to match k_cache")
        tensors[name] = scale
        if not 1 <= x.shape[3] <= MAX_TRANSFORMED_DIM:
            expected = f"a head dim from 1 to {MAX_TRANSFORMED_DIM} for a cache of {k_cache.dtype}"
            raise ValueError(f"{name[0]}: expected {expected}, got {x.shape[3]}")
    for name, tensor in tensors.items():
        require_device(name, tensor, k.device)
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_last_dim_contiguous(name, tensor)


def check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale):
    stored = ("positions", positions) if slots is None else ("slots", slots)
    check_update(k, v, k_cache, v_cache, stored[1], block_table, k_scale, v_scale, stored[0])
    _check_rotation(q, k, positions, cos, sin)


def _check_rotation(q, k, positions, cos, sin):
    """What rope_kv_cache_update takes beyond what `check_update` saw."""
    require_tensor("q", q, 4)
    B, _, T, D = k.shape
    require_dtype("q", q, (k.dtype,))
    require_shape("q", q, (B, q.shape[1], T, D), "(B, H, T, D) to match k")
    require_device("q", q, k.device)
    require_last_dim_contiguous("q", q)
    require_tensor("positions", positions, 2)
    require_dtype("positions", positions, (torch.int32, torch.int64))
    require_shape("positions", positions, (B, T), "(B, T)")
    require_device("positions", positions, k.device)
    require_tensor("cos", cos, 2)
    require_tensor("sin", sin, 2)
    if not 1 <= cos.shape[1] <= D // 2:
        raise ValueError(f"cos: expected from 1 to D / 2 = {D // 2} columns, got shape {tuple(cos.shape)}")
    if D > MAX_TRANSFORMED_DIM:
        raise ValueError(f"q: expected a head dim up to {MAX_TRANSFORMED_DIM}, got {D}")
    require_shape("sin", sin, tuple(cos.shape), "to match cos")
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_dtype(name, tensor, (torch.float32,) if k.dtype != torch.float64 else (torch.float32, torch.float64))
        require_device(name, tensor, k.device)
        require_last_dim_contiguous(name, tensor)


def _check_slots(positions, k_cache, block_table, name="positions"):
    """On CPU, raises ValueError for tokens without a slot; on CUDA that would need a synchronization."""
    if positions.device.type != "cpu" or positions.numel() == 0:
        return
    rows = k_cache.shape[2]
    capacity = rows if block_table is None else rows * block_table.shape[1]
    if (last := positions.max().item()) >= capacity:
        raise ValueError(f"{name}: expected values below the cache's capacity of {capacity}, got {last}")
    if block_table is not None and capacity:
        b, t = (positions >= 0).nonzero(as_tuple=True)
        pages = block_table[b, positions[b, t].long() // rows]
        outside = pages[(pages < 0) | (pages >= k_cache.shape[0])]
        if outside.numel():
            raise ValueError(f"block_table: expected pages from 0 to {k_cache.shape[0] - 1}, got {outside[0].item()}")


def _check_rope_slots(k_cache, positions, cos, slots, block_table):
    """The same for rope_kv_cache_update, and for tokens without angles."""
    if positions.device.type == "cpu" and positions.numel() and (last := positions.max().item()) >= cos.shape[0]:
        raise ValueError(f"positions: expected values below the {cos.shape[0]} rows of cos, got {last}")
    if slots is None:
        _check_slots(positions, k_cache, block_table)
    else:
        _check_slots(slots, k_cache, block_table, "slots")


def explain(k, v, k_cache, v_cache, positions, *, block_table=None, k_scale=None, v_scale=None, impl=None):
    """Implementation -> "chosen", "available", or why it refuses this call."""
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    return explain_call(IMPLEMENTATIONS, k, v, k_cache, v_cache, k_scale, v_scale, impl=impl)


def explain_rope(
    q, k, v, k_cache, v_cache, positions, cos, sin,
    *, slots=None, interleaved=False, block_table=None, k_scale=None, v_scale=None, impl=None,
):  # fmt: skip
    """The same for rope_kv_cache_update."""
    require_flag("interleaved", interleaved)
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    return explain_call(IMPLEMENTATIONS, k, v, k_cache, v_cache, k_scale, v_scale, q, cos, sin, impl=impl)


def _kernel_refuses(k, *others):
    if k.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and k is {k.dtype}"
    return derivatives_refused(k, *others)


def _cuda_refuses(k, *others):
    if not k.is_cuda:
        return runs_elsewhere("CUDA", "k", k.device)
    if (reason := CUDA_MISSING or _kernel_refuses(k, *others)) is not None:
        return reason
    if torch.compiler.is_compiling() or type(k) is not torch.Tensor:
        return None  # nothing can be launched to try it
    if k.device not in _TRIED:
        if torch.cuda.is_current_stream_capturing():
            return None
        _TRIED.add(k.device)
    return _launch_fails(k.device)


_TRIED: set[torch.device] = set()  # of which `_launch_fails` knows the answer, under capture, too


@functools.cache
def _launch_fails(device: torch.device) -> str | None:
    """Why the library's kernels do not run on a device, or None: it stores a number, and waits for it, once."""
    try:
        one, caches = torch.ones(1, 1, 1, 1, device=device), torch.zeros(2, 1, 1, 1, 1, device=device)
        _kv_cache_update(one, one, *caches, torch.zeros(1, 1, dtype=torch.int32, device=device), None, None, None)
        got = caches.flatten().tolist()
    except RuntimeError as error:
        got = str(error).partition("\n")[0]
    if got == [1.0, 1.0]:
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return (
        f"its kernels do not run on {device} ({got}): build fastgpt again with TORCH_CUDA_ARCH_LIST={capability}, by an nvcc "
        f"of CUDA {torch.version.cuda}"
    )


def _triton_refuses(k, *others):
    if not k.is_cuda:
        return runs_elsewhere("CUDA", "k", k.device)
    return triton_unusable(k.device) or _kernel_refuses(k, *others)


def _cpp_refuses(k, *others):
    if not k.is_cpu:
        return runs_elsewhere("CPU", "k", k.device)
    return _kernel_refuses(k, *others)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {
    "cpp": _cpp_refuses, "cuda": _cuda_refuses, "triton": _triton_refuses, "reference": lambda *tensors: None,
}  # fmt: skip


def _kv_cache_update_fake(k, v, k_cache, v_cache, positions, block_table=None, k_scale=None, v_scale=None):
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def _rope_kv_cache_update_fake(
    q, k, v, k_cache, v_cache, positions, cos, sin,
    slots=None, interleaved=False, block_table=None, k_scale=None, v_scale=None,
):  # fmt: skip
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    return q.new_empty(q.shape)


def _kv_cache_update_triton(k, v, k_cache, v_cache, positions, block_table=None, k_scale=None, v_scale=None):
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    _check_kernel(written, {"k": k, "v": v, "positions": positions, "block_table": block_table})
    from fastgpt.kernels.kv_cache_update import kv_cache_update  # Triton is imported only when a CUDA tensor needs it

    kv_cache_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def _rope_kv_cache_update_triton(
    q, k, v, k_cache, v_cache, positions, cos, sin,
    slots=None, interleaved=False, block_table=None, k_scale=None, v_scale=None,
):  # fmt: skip
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    read = {"k": k, "v": v, "positions": positions, "block_table": block_table, "q": q, "cos": cos, "sin": sin, "slots": slots}
    _check_kernel(written, read)
    from fastgpt.kernels.kv_cache_update import rope_kv_cache_update

    return rope_kv_cache_update(
        q, k, v, k_cache, v_cache, positions, cos, sin, slots, interleaved, block_table, k_scale, v_scale
    )


def _check_kernel(written: dict, read: dict) -> None:
    """What the Triton kernel takes less than the reference. Both: name -> tensor or None."""
    require_dtype("k", read["k"], KERNEL_DTYPES)
    regions = []
    for name, x in written.items():
        if x is None or x.numel() == 0:
            continue
        require_apart(name, x)
        for other, y, region in regions:
            if _overlap(_region_of(x), region) and not _interleaved(x, y):
                raise ValueError(f"{name}: expected memory apart from that of {other}")
        regions.append((name, x, _region_of(x)))
    for name, x in read.items():
        for other, _, region in regions if x is not None and x.numel() else ():
            if _overlap(_region_of(x), region):
                raise ValueError(f"{name}: expected memory apart from that of {other}, which is written; clone it")


def _region_of(x) -> tuple[int, int, int]:
    """Of a tensor with numbers: its storage, and there its first byte and the one past its last."""
    first, size = x.storage_offset(), x.element_size()
    last = first + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.untyped_storage()._cdata, first * size, (last + 1) * size


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _interleaved(x, y) -> bool:
    """Whether two parts of a tensor, each of numbers apart from each other, share none: told of those with the same strides."""
    dims = sorted(((stride, n) for stride, n in zip(x.stride(), x.shape) if n > 1), reverse=True)
    return (x.stride(), x.dtype) == (y.stride(), y.dtype) and not _reaches(x.storage_offset() - y.storage_offset(), dims)


def _reaches(distance: int, dims: list[tuple[int, int]]) -> bool:
    """Whether two numbers of a tensor with these strides and sizes, the larger strides first, are so far from each other."""
    if not dims:
        return distance == 0
    (stride, size), *rest = dims
    steps = distance // stride, distance // stride + 1
    return any(abs(i) < size and _reaches(distance - i * stride, rest) for i in steps)


# Name -> schema, the kernel of fake tensors and that of Triton.
OPERATORS = {
    "kv_cache_update": (
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? block_table=None, "
        "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()",
        _kv_cache_update_fake, _kv_cache_update_triton,
    ),
    "rope_kv_cache_update": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor cos, Tensor sin, "
        "Tensor? slots=None, bool interleaved=False, Tensor? block_table=None, Tensor(c!)? k_scale=None, "
        "Tensor(d!)? v_scale=None) -> Tensor",
        _rope_kv_cache_update_fake, _rope_kv_cache_update_triton,
    ),
}  # fmt: skip


def _registered(suffix: str, with_triton: bool) -> list:
    """The two operations, to which the compiled libraries add kernels. with_triton: Triton's are those of CUDA tensors."""
    for name, (schema, fake, triton) in OPERATORS.items():
        library.define(f"{name}{suffix}{schema}", f"fastgpt.{name}")
        torch.library.register_fake(f"fastgpt::{name}{suffix}", fake, lib=library)
        if with_triton:
            library.impl(f"{name}{suffix}", triton, "CUDA")
    return [without_autograd(getattr(torch.ops.fastgpt, f"{name}{suffix}").default) for name in OPERATORS]


_kv_cache_update, _rope_kv_cache_update = _registered("", with_triton=CUDA_MISSING is not None)
_with_triton = _kv_cache_update, _rope_kv_cache_update
if CUDA_MISSING is None:  # its kernels are those of the operations, and Triton's have some of their own
    _with_triton = _registered("_triton", with_triton=True)
