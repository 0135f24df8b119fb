"""The arguments of an attention call, as they are passed from checks to kernels."""

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """The arguments of `attention`, without return_lse and impl."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | torch.Tensor | None = None


class Packing(NamedTuple):
    """The boundaries of packed sequences: the arguments of attention_varlen that attention does not have."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


# The fields of Call that apply to packed sequences.
VARLEN_FIELDS = (*Call._fields[:9], "dropout_p", "dropout_seed")


def varlen_arguments(call: Call) -> list:
    return [getattr(call, name) for name in VARLEN_FIELDS]
