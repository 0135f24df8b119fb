"""The functions of flash_attn 2, served by fastgpt's kernels, on CPU and CUDA.

Names, arguments, defaults, shapes and results are those of flash_attn, with these differences:

- dtypes may be fp32 as well as fp16 and bf16, head dims need not be multiples of 8, and pages may have any size.
- The log-sum-exp of a query that attends to no key is -inf. It is differentiable.
- Lengths and block tables may be int64 as well as int32.
- `deterministic` and `num_splits` have no effect: gradients are always deterministic, and the kernel chooses the number of
  splits.
- Attention weights are never materialized: with return_attn_probs the third result is an empty tensor, and dropout must be 0.

Causal attention and windows are aligned to the bottom right: query i of T is at position i + S - T among S keys. With
window_size (left, right) it attends to the keys from `left` before its position to `right` after it; -1 is no bound.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    require_device,
    require_dtype,
    require_flag,
    require_integer,
    require_number,
    require_shape,
    require_tensor,
    shown,
)  # fmt: skip
from fastgpt.ops.attention import attention, attention_varlen
from fastgpt.ops.attention.checks import KERNEL_DTYPES, MAX_HEAD_DIM, SOFTCAPS
from fastgpt.ops.derivatives import refuse_transforms_of_cache, through_cache
from fastgpt.ops.kv_cache_update import kv_cache_update, rope_kv_cache_update, rope_reference

Result = torch.Tensor | tuple[torch.Tensor, ...]  # out, or with what else is asked for


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention of q (B, T, H, D) to k (B, S, H_kv, D) and v (B, S, H_kv, D_v), H a multiple of H_kv.

    Args:
        q, k, v: fp16|bf16|fp32 of the same dtype, on the same device.
        dropout_p: probability of zeroing a weight of the softmax.
        softmax_scale: factor on q·k; default 1 / sqrt(D).
        causal: bottom-right aligned causal mask.
        window_size: (left, right) in tokens, as above; -1 is no bound.
        softcap: bound on the scaled scores; 0 for none.
        alibi_slopes: (H,) or (B, H) fp32; adds -slope · |i + S - T - j| to the scores.
        deterministic: no effect: gradients are always deterministic.
        return_attn_probs: also return the log-sum-exp, and an empty tensor for the weights.

    Returns: out (B, T, H, D_v), or (out, lse (B, H, T) fp32, empty).
    Raises: TypeError, ValueError: argument, expected, got. Shapes of q, k and v in messages have heads before tokens.
    """
    require_tensor("q", q, 4)
    options = _options(q, causal, window_size, softcap, alibi_slopes, softmax_scale, dropout_p, return_attn_probs)
    out, lse = attend(q, k, v, **options)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention of q (B, T, H, D) to keys and values packed in kv (B, S, 2, H_kv, D); otherwise as `flash_attn_func`.

    Returns: out (B, T, H, D), or (out, lse (B, H, T) fp32, empty).
    """
    k, v = _unpacked("kv", kv, 2, 5)
    with _naming(k="kv", v="kv"):
        return flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention of queries, keys and values packed in qkv (B, T, 3, H, D); otherwise as `flash_attn_func`.

    Returns: out (B, T, H, D), or (out, lse (B, H, T) fp32, empty).
    """
    q, k, v = _unpacked("qkv", qkv, 3, 5)
    with _naming(q="qkv", k="qkv", v="qkv"):
        return flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: torch.Tensor | None = None,
) -> Result:  # fmt: skip
    """Attention within sequences of different lengths, packed one after the other.

    Args:
        q: (total_q, H, D). Sequence b has rows cu_seqlens_q[b] to cu_seqlens_q[b+1].
        k: (total_k, H_kv, D) likewise; with a block table a pool of pages (num_pages, page, H_kv, D).
        v: as k, with a head dim D_v that may differ.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device, ascending from 0. Rows past the last sequence are ignored:
            their out is 0 and their lse -inf.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence.
        block_table: (B, pages) int32: key j of sequence b is in row j % page of page block_table[b, j // page].
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs: as in
            `flash_attn_func`. Windows to the right, alibi_slopes (B, H) and block tables are served by padding all sequences
            to the longest, with more time and memory.

    Returns: out (total_q, H, D_v), or (out, lse (H, total_q) fp32, empty).
    Raises: TypeError, ValueError as `flash_attn_func`; on CPU also for cu_seqlens that are not as above.
    """
    require_tensor("q", q, 3)
    options = _options(q, causal, window_size, softcap, alibi_slopes, softmax_scale, dropout_p, return_attn_probs)
    for name, x in (("k", k), ("v", v)):
        require_tensor(name, x, 3 if block_table is None else 4)
    starts = [_int32("cu_seqlens_q", cu_seqlens_q, q.device, 1), _int32("cu_seqlens_k", cu_seqlens_k, q.device, 1)]
    longest = [_integer("max_seqlen_q", max_seqlen_q, 0), _integer("max_seqlen_k", max_seqlen_k, 0)]
    table = None if block_table is None else _int32("block_table", block_table, q.device, 2)
    total = len(q)
    if q.is_cpu:
        used = _checked_packing(starts, longest, total, len(k) if table is None else None)
        q = q[: used[0]]
        k, v = (k[: used[1]], v[: used[1]]) if table is None else (k, v)
    out, lse = attend_packed(q, k, v, *starts, *longest, block_table=table, **options)
    if (rest := total - len(out)) > 0:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, rest)), F.pad(lse, (0, rest), value=-torch.inf)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention within packed sequences, of q (total_q, H, D) to kv (total_k, 2, H_kv, D); otherwise as `flash_attn_varlen_func`.

    Returns: out (total_q, H, D), or (out, lse (H, total_q) fp32, empty).
    """
    k, v = _unpacked("kv", kv, 2, 4)
    with _naming(k="kv", v="kv"):
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
            softcap, alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Attention within packed sequences, of qkv (total, 3, H, D); otherwise as `flash_attn_varlen_func`.

    Args:
        cu_seqlens: (B + 1,) int32 on the device of qkv, ascending from 0, of queries and keys.
        max_seqlen: at least the length of the longest sequence.

    Returns: out (total, H, D), or (out, lse (H, total) fp32, empty).
    """
    q, k, v = _unpacked("qkv", qkv, 3, 4)
    with _naming(q="qkv", k="qkv", v="qkv", cu_seqlens_q="cu_seqlens", max_seqlen_q="max_seqlen"):
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_attn_probs,
        )  # fmt: skip


def _without_derivatives(function):
    """Decorates a function that reads a cache: forward-mode derivatives raise in the call, gradients in the backward pass."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        refuse_transforms_of_cache()
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        return through_cache(lambda *_: function(*args, **options), *tensors)

    return wrapper


@_without_derivatives
def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None, rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: torch.Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:  # fmt: skip
    """Attention over a KV cache, after new keys and values are appended to it in place. The cache is not copied.

    Args:
        q: (B, T, H, D).
        k_cache: (B_cache, S, H_kv, D), or with a block table a pool of pages (num_pages, page, H_kv, D); written.
        v_cache: as k_cache, with a head dim D_v that may differ; written.
        k, v: (B, T_new, H_kv, D) and (B, T_new, H_kv, D_v), stored from position cache_seqlens on.
        rotary_cos, rotary_sin: (positions, R / 2), preferably fp32: rotary embedding of the first R dimensions of new keys,
            at positions cache_seqlens + t, and of q: at cache_seqlens + t if causal or with a window, else all at
            cache_seqlens.
        cache_seqlens: int, or (B,) int32: the number of cached tokens of each sequence before this call. None: all S.
        cache_batch_idx: (B,) int32: the rows of the cache for these sequences; default 0 to B - 1.
        cache_leftpad: (B,) int32: keys before it are not attended to.
        block_table: (B, pages) int32: token j of sequence b is in row j % page of page block_table[b, j // page].
        rotary_interleaved: whether pairs of dimensions are (2n, 2n + 1) or (n, n + R / 2).
        num_splits: no effect: the kernel chooses.
        return_softmax_lse: also return the log-sum-exp.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`, with S = cache_seqlens + T_new.

    Returns: out (B, T, H, D_v), or (out, lse (B, H, T) fp32). Their backward pass raises RuntimeError.
    Raises: TypeError, ValueError: argument, expected, got, before anything is written; on CPU also for a token outside the
        cache or the rows of rotary_cos.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, x, 4)
    options = _options(q, causal, window_size, softcap, alibi_slopes, softmax_scale)
    require_flag("rotary_interleaved", rotary_interleaved)
    require_flag("return_softmax_lse", return_softmax_lse)
    B = q.shape[0]
    if cache_seqlens is not None and not isinstance(cache_seqlens, torch.Tensor):
        length = require_integer("cache_seqlens", cache_seqlens, least=0, most=2**31 - 1)
        cache_seqlens = torch.full((B,), length, dtype=torch.int32, device=q.device)
    lengths, rows, leftpad = (
        None if x is None else _int32(name, x, q.device, 1, B)
        for name, x in (
            ("cache_seqlens", cache_seqlens),
            ("cache_batch_idx", cache_batch_idx),
            ("cache_leftpad", cache_leftpad),
        )
    )
    table = None if block_table is None else _int32("block_table", block_table, q.device, 2, B)
    if rows is not None:
        if table is not None:
            raise ValueError("cache_batch_idx: expected None with a block_table, got a tensor")
        if rows.is_cpu and ((rows < 0) | (rows >= len(k_cache))).any():
            raise ValueError(f"cache_batch_idx: expected rows from 0 to {len(k_cache) - 1}, got {rows.tolist()}")
        table = rows.unsqueeze(1)  # each row of the cache is a page
    for name, x in (("v", v), ("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if k is None and x is not None:
            raise ValueError(f"k: expected new keys with {name}, got None")
    if lengths is not None:
        new = 0 if k is None else _number_of_tokens("k", k)
        _check_room(lengths, new, k_cache.shape[1], table if rows is None else None)
    if k is not None:
        _check_attends(q, k_cache, v_cache, alibi_slopes)  # before anything is written
        with _naming(cos="rotary_cos", sin="rotary_sin"):
            q, lengths = _append(
                q, k, v, k_cache, v_cache, lengths, table, rotary_cos, rotary_sin, rotary_interleaved,
                local=causal or options["window_size"] != (-1, -1),
            )  # fmt: skip
    with _naming(k="k_cache", v="v_cache"):
        out, lse = attend(q, k_cache, v_cache, lengths=lengths, leftpad=leftpad, block_table=table, **options)
    return (out, lse) if return_softmax_lse else out


def _check_attends(q, k_cache, v_cache, alibi_slopes) -> None:
    """Raises the errors of attention for dtypes, shapes and devices that do not match."""
    H, D = q.shape[2:]
    require_dtype("q", q, (*KERNEL_DTYPES, torch.float64))
    for name, x in (("q", q), ("v_cache", v_cache)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            got = f"{x.shape[3]} in shape {tuple(x.shape)}"
            raise ValueError(f"{name}: expected a head dim from 1 to {MAX_HEAD_DIM}, got {got}")
    heads = k_cache.shape[2]
    if heads == 0 or H % heads:
        raise ValueError(f"k_cache: expected a number of heads that divides the {H} heads of q, got {heads}")
    for name, x, head_dim in (("k_cache", k_cache, D), ("v_cache", v_cache, v_cache.shape[3])):
        require_dtype(name, x, (q.dtype,))
        require_shape(name, x, (*k_cache.shape[:3], head_dim), "to match q and k_cache")
        require_device(name, x, q.device)
    if alibi_slopes is not None:
        whole = (H,) if alibi_slopes.dim() == 1 else (len(q), H)
        require_shape("alibi_slopes", alibi_slopes, whole, "(H,) or (B, H)")


def _number_of_tokens(name, x) -> int:
    require_tensor(name, x, 4)
    return x.shape[1]


def _check_room(lengths, new: int, rows: int, table) -> None:
    """On CPU, raises ValueError if cache_seqlens exceeds the cache, or there is no room for new tokens."""
    if not lengths.is_cpu or lengths.numel() == 0:
        return
    least, most = lengths.min().item(), lengths.max().item()
    capacity = rows if table is None else rows * table.shape[1]
    if least < 0:
        raise ValueError(f"cache_seqlens: expected lengths >= 0, got {least}")
    if most + new > capacity and table is not None:
        raise ValueError(f"block_table: expected pages for {most} tokens and {new} new ones, got {capacity} slots")
    if most + new > capacity:
        raise ValueError(
            f"cache_seqlens: expected at most {capacity - new}, the rows of the cache less {new} new ones, got {most}"
        )


def _append(q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, interleaved, local):
    """Stores k and v. Returns q, rotated if there are cos and sin, and the lengths of the sequences afterwards."""
    if v is None or cache_seqlens is None or (cos is None) != (sin is None):
        missing = (
            "v" if v is None else "cache_seqlens" if cache_seqlens is None else "rotary_cos" if cos is None else "rotary_sin"
        )
        raise ValueError(f"{missing}: expected with k, got None")
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    T, T_new = q.shape[1], k.shape[1]
    steps = torch.arange(max(T, T_new), dtype=torch.int32, device=q.device)
    positions = cache_seqlens.unsqueeze(1) + steps  # (B, max(T, T_new))
    new = [_heads_first(x) for x in (k, v)]
    caches = [x.transpose(1, 2) for x in (k_cache, v_cache)]
    if cos is None:
        kv_cache_update(*new, *caches, positions[:, :T_new], block_table=block_table)
        return q, cache_seqlens + T_new
    for name, x in (("cos", cos), ("sin", sin)):
        require_tensor(name, x, 2)
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(f"cos: expected at most {q.shape[3] // 2} columns, half of the head dim, got shape {tuple(cos.shape)}")
    require_shape("sin", sin, tuple(cos.shape), "to match rotary_cos")
    if positions.is_cpu and positions[:, :T_new].numel() and (last := positions[:, :T_new].max().item()) >= cos.shape[0]:
        raise ValueError(f"cos: expected more than {last} rows, the last position of k, got {cos.shape[0]}")
    angles = [x.float() for x in (cos, sin)]
    options = {"interleaved": interleaved, "block_table": block_table}
    if T == T_new and (local or T == 1):
        rotated = rope_kv_cache_update(_heads_first(q), *new, *caches, positions, *angles, **options)
    else:
        positions_q = positions[:, :T] if local else positions[:, :1].expand(-1, T)
        if positions_q.is_cpu and positions_q.numel() and (last := positions_q.max().item()) >= cos.shape[0]:
            raise ValueError(f"rotary_cos: expected more than {last} rows, the last position of q, got {cos.shape[0]}")
        rotated = rope_reference(_heads_first(q), positions_q, *angles, interleaved=interleaved)
        unused_q = new[0][:, :1]  # the operation rotates queries, too
        rope_kv_cache_update(unused_q, *new, *caches, positions[:, :T_new], *angles, **options)
    return rotated.transpose(1, 2), cache_seqlens + T_new


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *, causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: torch.Tensor | None, scale: float | None,
    lengths: torch.Tensor | None = None, leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out (B, T, H, D_v), lse (B, H, T)) of q (B, T, H, D), k (B, S, H_kv, D) and v (B, S, H_kv, D_v), or pages of them
    (num_pages, page, H_kv, D or D_v)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, 4)
    causal, window, right = bounds(causal, window_size)
    slopes_of_sequences = alibi_slopes is not None and alibi_slopes.dim() == 2
    mask = bias = None
    if right is not None or leftpad is not None or slopes_of_sequences:
        B, T, H, _ = q.shape
        key = torch.arange(k.shape[1] * (1 if block_table is None else block_table.shape[1]), device=q.device)
        past = len(key) - T if lengths is None else lengths.view(B, 1, 1, 1) - T
        q_pos = torch.arange(T, device=q.device).unsqueeze(1) + past  # positions among the keys, (T, 1) or (B, 1, T, 1)
        if right is not None:
            mask = key <= q_pos + right
        if leftpad is not None:
            is_token = key >= leftpad.view(B, 1, 1, 1)
            mask = is_token if mask is None else mask & is_token
        if slopes_of_sequences:
            require_shape("alibi_slopes", alibi_slopes, (B, H), "(B, H) or (H,)")
            bias, alibi_slopes = -alibi_slopes[:, :, None, None] * (q_pos - key).abs(), None
    out, lse = attention(
        *(_heads_first(x) for x in (q, k, v)), causal=causal, window=window, softcap=softcap or None, scale=scale,
        alibi_slopes=alibi_slopes, mask=mask, bias=bias, kv_lengths=lengths, block_table=block_table,
        dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def attend_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: torch.Tensor | None, scale: float | None,
    lengths: torch.Tensor | None = None, block_table: torch.Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out (total_q, H, D_v), lse (H, total_q)) of packed sequences. lengths: (B,) number of keys to use; None: all."""
    options = {
        "softcap": softcap, "alibi_slopes": alibi_slopes, "scale": scale, "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }  # fmt: skip
    is_causal, window, right = bounds(causal, window_size)
    needs_no_padding = block_table is None and lengths is None and right is None
    if needs_no_padding and (alibi_slopes is None or alibi_slopes.dim() == 1):
        options |= {"causal": is_causal, "window": window, "softcap": softcap or None}
        q, k, v = (_last_contiguous(x) for x in (q, k, v))
        packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attention_varlen(q, k, v, *packing, return_lse=True, **options)
        return out, lse
    # Queries are padded on the left, since attention aligns the last row with the last key. Rows past the last sequence go to an
    # extra row.
    b, row = _rows(cu_seqlens_q, len(q), max_seqlen_q, to_the_right=True)
    tensors = [_padded(q, b, row, len(cu_seqlens_q) - 1, max_seqlen_q)]
    if block_table is None:
        b_k, row_k = _rows(cu_seqlens_k, len(k), max_seqlen_k)
        tensors += [_padded(x, b_k, row_k, len(cu_seqlens_k) - 1, max_seqlen_k) for x in (k, v)]
    else:
        tensors += [k, v]
    lengths = cu_seqlens_k.diff() if lengths is None else lengths
    out, lse = attend(*tensors, causal=causal, window_size=window_size, lengths=lengths, block_table=block_table, **options)
    out, lse = F.pad(out, (0, 0, 0, 0, 0, 1)), F.pad(lse, (0, 1), value=-torch.inf)
    return out[b, row], lse[b, :, row].T


def _padded(x, b, row, B: int, longest: int):
    """(total, heads, D) -> (B, longest, heads, D)."""
    return x.new_zeros(B, longest + 1, *x.shape[1:]).index_put((b, row), x)[:, :longest]


def _rows(cu_seqlens, total: int, longest: int, to_the_right=False):
    """For each packed token, the index of its sequence and its row after padding to the longest; row `longest` for tokens past
    the last sequence."""
    lengths = cu_seqlens.diff()
    token = torch.arange(total, device=cu_seqlens.device)
    b = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=len(lengths) - 1)
    row = token - cu_seqlens[b]
    row = row + (longest - lengths[b]) if to_the_right else row
    return b, row.where(token < cu_seqlens[-1], longest)


def _checked_packing(starts, longest, *totals) -> list[int]:
    """Checks cu_seqlens on a CPU. Returns the rows of queries and keys that they cover. totals: existing rows; None: unknown."""
    used = []
    for name, cu_seqlens, limit, total in zip("qk", starts, longest, totals):
        if len(cu_seqlens) < 2 or len(cu_seqlens) != len(starts[0]):
            wanted = "shape (B + 1,), B >= 1, the same for queries and keys"
            raise ValueError(f"cu_seqlens_{name}: expected {wanted}, got {tuple(cu_seqlens.shape)}")
        lengths, last = cu_seqlens.diff(), cu_seqlens[-1].item()
        if cu_seqlens[0] != 0 or (lengths < 0).any() or total is not None and last > total:
            bound = "" if total is None else f" to at most {total}"
            raise ValueError(f"cu_seqlens_{name}: expected numbers that ascend from 0{bound}, got {cu_seqlens.tolist()}")
        if (most := lengths.max().item()) > limit:
            raise ValueError(f"max_seqlen_{name}: expected at least {most}, the longest sequence, got {limit}")
        used.append(last)
    return used


def bounds(causal: bool, window_size: tuple[int, int]) -> tuple[bool, int | None, int | None]:
    """causal and window for fastgpt.attention, and the number of keys to the right, which need a mask, or None."""
    left, right = window_size
    if causal:
        right = 0
    return right == 0, None if left < 0 else left + 1, right if right > 0 else None


@contextlib.contextmanager
def _naming(**names: str):
    """Renames the arguments that errors of inner functions begin with."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in names:
            raise
        raise type(error)(f"{names[name]}:{rest}") from None


def _heads_first(x):
    return _last_contiguous(x).transpose(1, 2)


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _unpacked(name, x, parts, dims):
    require_tensor(name, x, dims)
    if x.shape[-3] != parts:
        raise ValueError(f"{name}: expected {parts} in the third dimension from the end, got shape {tuple(x.shape)}")
    return x.unbind(-3)


def _options(q, causal, window_size, softcap, alibi_slopes, softmax_scale, dropout_p=0.0, return_attn_probs=False) -> dict:
    """Checks the common arguments, and returns the options of `attend`."""
    require_flag("causal", causal)
    require_flag("return_attn_probs", return_attn_probs)
    dropout_p = require_number("dropout_p", dropout_p, least=0, below=1)
    if return_attn_probs and dropout_p > 0:
        raise ValueError(f"return_attn_probs: expected False with dropout, got True with dropout_p={dropout_p}")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size: expected two integers >= -1, got {shown(window_size)}")
    if alibi_slopes is not None:
        require_tensor("alibi_slopes", alibi_slopes)
        if alibi_slopes.dim() not in (1, 2):
            raise ValueError(f"alibi_slopes: expected shape (H,) or (B, H), got {tuple(alibi_slopes.shape)}")
        require_dtype("alibi_slopes", alibi_slopes, (torch.float32,))
        require_device("alibi_slopes", alibi_slopes, q.device)
    return {
        "causal": causal, "window_size": tuple(_integer("window_size", size, -1) for size in window_size),
        "softcap": _softcap(softcap), "alibi_slopes": alibi_slopes,
        "scale": require_number("softmax_scale", softmax_scale, optional=True), "dropout_p": dropout_p,
    }  # fmt: skip


def _softcap(value) -> float:
    value, (least, most) = require_number("softcap", value), SOFTCAPS
    if value != 0 and not least <= value <= most:
        raise ValueError(f"softcap: expected 0 for none, or a number >= {least} and <= {most}, got {value}")
    return value


def _integer(name: str, value, least: int) -> int:
    """The value as an int; it may also be a tensor with one element."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool:
        value = value.item()
    return require_integer(name, value, least=least, most=2**31 - 1)


def _int32(name: str, x, device, ndim: int, B: int | None = None) -> torch.Tensor:
    require_tensor(name, x, ndim)
    require_dtype(name, x, (torch.int32, torch.int64))
    if B is not None:
        require_shape(name, x, (B, *x.shape[1:]), "(B,)" if ndim == 1 else "(B, pages)")
    require_device(name, x, device)
    return x.int()
