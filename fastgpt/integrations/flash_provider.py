"""fastgpt as a provider of PyTorch's flash attention on CUDA, the backend of scaled_dot_product_attention, of compiled graphs and
of torch.nn.attention.varlen.

    import fastgpt.integrations.flash_provider
    torch.nn.attention.activate_flash_attention_impl("fastgpt")
    ...
    torch.nn.attention.restore_flash_attention_impl()

Importing this module registers the name, and activates nothing. Dropout, pages of any size, ALiBi slopes and windows are
supported; attention weights (return_debug_mask), gradients through windows to the right and 8-bit floats raise RuntimeError.

The functions have the names of the aten operators that they override. q, k, v and results are (B, T, H, head dim), or packed
(total, H, head dim), and (B, H, T, head dim) for scaled_dot_product_...; causal attention is aligned to the bottom right.
"""

import torch

from fastgpt.integrations.flash_attn import attend, attend_packed, bounds
from fastgpt.ops.library import without_autograd

_attention_backward = without_autograd(torch.ops.fastgpt.attention_backward.default)
_attention_varlen_backward = without_autograd(torch.ops.fastgpt.attention_varlen_backward.default)


class Handle:
    """Keeps the operators overridden until it is removed."""

    def __init__(self, library: torch.library.Library):
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None  # the only reference


def register(key: str = "CUDA") -> Handle:
    """Overrides PyTorch's flash attention for tensors of a dispatch key. Returns a handle whose `remove` restores it."""
    library = torch.library.Library("aten", "IMPL", key)
    for function in (
        _scaled_dot_product_flash_attention,
        _scaled_dot_product_flash_attention_backward,
        _flash_attention_forward,
        _flash_attention_forward_no_dropout_inplace,
        _flash_attention_backward,
    ):
        if hasattr(torch.ops.aten, function.__name__):  # older versions of PyTorch lack the in-place one
            library.impl(function.__name__, function)
    return Handle(library)


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("fastgpt", register_fn=register)


def _scaled_dot_product_flash_attention(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    T, S = q.shape[1], k.shape[1]
    out, lse, *random = _flash_attention_forward(
        q, k, v, None, None, T, S, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, T, S, *random


def _scaled_dot_product_flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, None, None, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, philox_seed,
        philox_offset, scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in grads)


@torch.no_grad()
def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    if return_debug_mask:
        raise RuntimeError("return_debug_mask: expected False with fastgpt, which never materializes the weights, got True")
    # The backward gets this as the generator's state; its first number is the seed.
    state = torch.randint(2**62, (2,), device=query.device) if dropout_p > 0 else query.new_zeros(2, dtype=torch.int64)
    options = {
        "causal": is_causal, "window_size": _window(window_size_left, window_size_right), "scale": scale,
        "softcap": 0.0, "alibi_slopes": alibi_slopes, "lengths": seqused_k, "block_table": block_table,
        "dropout_p": dropout_p, "dropout_seed": state[:1],
    }  # fmt: skip
    if cum_seq_q is None:
        out, lse = attend(query, key, value, **options)
    else:
        out, lse = attend_packed(query, key, value, cum_seq_q, cum_seq_k, max_seqlen_q, max_seqlen_k, **options)
    offset = query.new_zeros((), dtype=torch.uint64)
    return _in_order_of(query, out), lse.contiguous(), state.view(torch.uint64), offset, query.new_empty(0)


def _flash_attention_forward_no_dropout_inplace(out, *arguments, **options):
    result, lse, *_ = _flash_attention_forward(*arguments, **options)
    out.copy_(result)
    return lse


@torch.no_grad()
def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    causal, window, right = bounds(is_causal, _window(window_size_left, window_size_right))
    if right is not None:
        raise RuntimeError(f"window_size_right: expected -1 or 0 with fastgpt's gradient, got {right}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = cum_seq_q is not None
    # The operations take (B, H, T, D), of packed sequences (1, H, total, D).
    tensors = [x.unsqueeze(0) if packed else x for x in (grad_out, query, key, value, out)]
    dout, q, k, v, out = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors)
    dropout = {"dropout_p": dropout_p, "dropout_seed": rng_state.view(torch.int64)[:1]}
    if packed:
        packing = (cum_seq_q, cum_seq_k, max_seqlen_q, max_seqlen_k)
        grads = _attention_varlen_backward(
            dout, None, out, logsumexp.unsqueeze(0), *packing, q, k, v, causal, scale, window, **dropout
        )
    else:
        grads = _attention_backward(dout, None, out, logsumexp, False, q, k, v, causal, scale, window, **dropout)
    grads = (x.transpose(1, 2) for x in grads[:3])
    return tuple(_in_order_of(like, x[0] if packed else x) for like, x in zip((query, key, value), grads))


def _window(left, right):
    return tuple(-1 if size is None or size < 0 else size for size in (left, right))


def _in_order_of(like, x):
    """x with the strides of `like`, which compiled graphs expect; unchanged if the shapes differ (other head dim of values)."""
    if x.shape != like.shape:
        return x
    expected = torch.empty_like(like)
    return x if x.stride() == expected.stride() else expected.copy_(x)
