"""A call of every launcher of the package."""

import torch
from fake_gpu import meta

from fastgpt.kernels import (
    attention_backward,
    attention_decode,
    attention_forward,
    decode_step,
    kv_cache_update,
    linear,
    moe,
    norm,
)
from fastgpt.kernels.linear_quantized import linear_quantized
from fastgpt.kernels.moe_quantized import moe_quantized


def calls(n: int, meta=meta):
    """Every launcher -> a call in which all that may vary without another kernel depends on n, of tensors without memory, or of
    what else `meta` makes."""
    keys = 65 + 2 * n  # odd, so that no row of a mask is read in vectors
    q, kv = meta(n, 2 * n, 64 + n, 64), meta(n, n, keys, 64)
    lse, lengths = meta(n, 2 * n, 64 + n, dtype=torch.float32), meta(n, dtype=torch.int32)
    bias, mask = meta(64 + n, keys), meta(64 + n, keys, dtype=torch.bool)
    x, w, many = meta(1, 128), meta(16 * n, 128), meta(130 + n, 128)
    pages, table = meta(5 * n, n, 16, 64), meta(n, 20 * n, dtype=torch.int32)
    token, one, slots = meta(n, 2 * n, 1, 64), meta(n, n, 1, 64), meta(n, 1, dtype=torch.int32)
    angles, ids = meta(100 * n, 32, dtype=torch.float32), meta(n, 1, dtype=torch.int64)
    long = meta(n, n, 600 + n, 64)
    room, places = meta(n, 2 * n, 99 * n, 64), meta(n, 64 + n, dtype=torch.int32)
    packed, packed_kv = meta(1, 2 * n, 500 * n, 64), meta(1, n, 500 * n, 64)
    rows, residual, weight = meta(n, 128), meta(n, 16 * n), meta(128)
    blocks = meta(16 * n, 4 * 18, dtype=torch.uint8), 4, 32, False
    strided = meta(3, n, 128, strides=(3000 + n * 130, 130, 1))
    embedding, positions_of = meta(50 * n, 128), meta(60 * n, 128)
    largest, tokens, extreme = meta(n, 1), meta(7 * n, n, dtype=torch.int64), meta(n, 1, dtype=torch.float32)
    step, ended, eos = meta(1, dtype=torch.int64), meta(n, dtype=torch.bool), meta(n, dtype=torch.int64)
    up, down, logits = meta(8, 32, 128), meta(8, 128, 16), meta(n, 8)
    # More than 16 rows for each of 8 experts, and at most 32: as many as fit into a tile are a variant.
    chosen, weights = meta(64 + n, 2, dtype=torch.int32), meta(64 + n, 2, dtype=torch.float32)
    of_experts = (
        meta(8 * 64, 4 * 18, dtype=torch.uint8),
        (4, 32, False),
        meta(8 * 128, 34, dtype=torch.uint8),
        (8, 32, False),
        8,
    )
    counters = meta(99 * n * n, dtype=torch.int32)  # zeros, as those of a cache
    new = attention_decode.NewToken(one, one, slots, slots, angles, angles)
    decode, options = attention_decode.attention_decode, {"causal": True, "scale": 0.1}
    return {
        "forward": lambda: attention_forward.attention_forward(q, kv, kv, scale=0.1, window=3 * n),
        "forward, bias and mask": lambda: attention_forward.attention_forward(q, kv, kv, scale=0.1, bias=bias, mask=mask),
        "forward, packed": lambda: attention_forward.attention_forward(
            packed, packed_kv, packed_kv, scale=0.1, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=300 * n
        ),
        "forward, pages": lambda: attention_forward.attention_forward(q, pages, pages, scale=0.1, block_table=table),
        "backward": lambda: attention_backward.attention_backward(
            q, None, q, kv, kv, q, lse, scale=0.1, bias=bias, needs_dbias=True, window=3 * n
        ),
        "decode": lambda: decode(token, long, long, **options, window=400 + n, kv_lengths=lengths),
        "decode, pages": lambda: decode(token, pages, pages, **options, block_table=table),
        "decode, new": lambda: decode(token, long, long, **options, new=new, counters=counters),
        "update": lambda: kv_cache_update.kv_cache_update(q, q, room, room, places),
        "linear": lambda: linear.linear(x, w),
        "linear, rows": lambda: linear.linear(rows, w, residual=residual),
        "quantized": lambda: linear_quantized(x, *blocks),
        "quantized, rows": lambda: linear_quantized(rows, *blocks, residual=residual),
        "quantized, many rows": lambda: linear_quantized(many, *blocks),
        "route": lambda: moe.route(logits, 2),
        "moe": lambda: moe.moe(x, chosen[:1], weights[:1], up, down),
        "moe, many rows": lambda: moe.moe(many[: 64 + n], chosen, weights, up, down, residual=many[: 64 + n]),
        "moe, quantized": lambda: moe_quantized(x, chosen[:1], weights[:1], *of_experts),
        "norm": lambda: norm.norm(many, weight, residual=many),
        "norm, strided": lambda: norm.norm(strided, weight),
        "embed": lambda: decode_step.embed(ids, embedding, slots, positions_of),
        "advance": lambda: decode_step.advance(lengths, slots),
        "record_token": lambda: decode_step.record_token(ids[:, 0], largest, tokens, extreme, step, ended, eos),
    }  # fmt: skip
