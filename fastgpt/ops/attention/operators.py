"""The registered operations of attention, and their Triton implementations; those of C++ are in csrc/attention."""

import torch

from fastgpt.ops.attention.call import VARLEN_FIELDS, Call, Packing
from fastgpt.ops.attention.checks import check_backward, check_call, check_for_triton, check_packing
from fastgpt.ops.library import library, without_autograd

library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? mask=None, Tensor? bias=None, Tensor? kv_lengths=None, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    "fastgpt.attention",
)
library.define(
    "attention_check(Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? kv_lengths=None, Tensor? block_table=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    "fastgpt.attention",
)
library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool needs_dbias, Tensor q, Tensor k, "
    "Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? mask=None, Tensor? bias=None, Tensor? kv_lengths=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastgpt.attention",
)
_PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
library.define(
    f"attention_varlen_forward({_PACKING}, Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, "
    "float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    "fastgpt.attention_varlen",
)
library.define(
    f"attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_PACKING}, Tensor q, Tensor k, "
    "Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, float dropout_p=0.0, Tensor? dropout_seed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "fastgpt.attention_varlen",
)
attention_forward = without_autograd(torch.ops.fastgpt.attention_forward.default)
attention_backward = without_autograd(torch.ops.fastgpt.attention_backward.default)
attention_check = without_autograd(torch.ops.fastgpt.attention_check.default)


@torch.library.register_fake("fastgpt::attention_check", lib=library)
def _attention_check_fake(*arguments):
    check_call(Call(*arguments[:9], None, None, *arguments[9:]))  # which has neither mask nor bias


@torch.library.register_fake("fastgpt::attention_forward", lib=library)
def _attention_forward_fake(*arguments):
    call = Call(*arguments)
    check_call(call)
    B, H, T, _ = call.q.shape
    # Token-major storage: the model reads the result as (B, T, H * D_v) without a copy.
    out = call.q.new_empty(B, T, H, call.v.shape[3]).transpose(1, 2)
    return out, call.q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.register_fake("fastgpt::attention_backward", lib=library)
def _attention_backward_fake(dout, dlse, out, lse, needs_dbias, q, k, v, *arguments):
    call = Call(q, k, v, *arguments[:9])
    dbias = call.bias.new_empty(call.bias.shape) if needs_dbias else q.new_empty(0)
    dsinks = q.new_empty(0) if call.sinks is None else torch.empty_like(call.sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


DECODE_QUERIES = 16  # up to this number of queries per sequence, the decode kernel splits the keys among programs


def attention_forward_triton(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    # Triton is imported only when a CUDA tensor needs it.
    from fastgpt.kernels.attention_decode import attention_decode
    from fastgpt.kernels.attention_forward import attention_forward

    call = Call(*arguments)
    check_for_triton(call)
    options = call._asdict()
    q, k, v = options.pop("q"), options.pop("k"), options.pop("v")
    if q.shape[2] > DECODE_QUERIES or call.dropout_p > 0:
        return attention_forward(q, k, v, **options)
    for name in ("dropout_p", "dropout_seed"):
        del options[name]
    return attention_decode(q, k, v, **options)


def attention_backward_triton(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_dbias: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *arguments,
) -> tuple[torch.Tensor, ...]:
    from fastgpt.kernels.attention_backward import attention_backward

    names = (*Call._fields[3:12], "dropout_p", "dropout_seed")
    options = dict(zip(names, arguments))
    check_backward(Call(q, k, v, **options), dout, dlse, out, lse)
    if needs_dbias and options.get("bias") is None:
        raise ValueError("bias: expected a tensor, whose gradient is required, got None")
    dq, dk, dv, dbias, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias=needs_dbias, **options)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsinks is None else dsinks


library.impl("attention_forward", attention_forward_triton, "CUDA")
library.impl("attention_backward", attention_backward_triton, "CUDA")


@torch.library.register_fake("fastgpt::attention_varlen_forward", lib=library)
def _attention_varlen_forward_fake(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k, v, *arguments):
    _, H, total, _ = q.shape
    out = q.new_empty(1, total, H, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(1, H, total, dtype=torch.float32)


@torch.library.register_fake("fastgpt::attention_varlen_backward", lib=library)
def _attention_varlen_backward_fake(
    dout, dlse, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k, v, *arguments
):
    sinks = dict(zip(VARLEN_FIELDS[3:], arguments)).get("sinks")
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def attention_varlen_forward_triton(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    from fastgpt.kernels.attention_forward import attention_forward

    options = dict(zip(VARLEN_FIELDS, arguments))
    check_packing(check_for_triton(Call(**options)), Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    q, k, v = options.pop("q"), options.pop("k"), options.pop("v")
    return attention_forward(
        q, k, v, **options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q
    )


def attention_varlen_backward_triton(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *arguments,
) -> tuple[torch.Tensor, ...]:
    from fastgpt.kernels.attention_backward import attention_backward

    options = dict(zip(VARLEN_FIELDS[3:], arguments))
    packing, call = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), Call(q, k, v, **options)
    check_backward(call, dout, dlse, out, lse)
    packing = check_packing(call, packing)._asdict()
    dq, dk, dv, _, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, **options, **packing)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


library.impl("attention_varlen_forward", attention_varlen_forward_triton, "CUDA")
library.impl("attention_varlen_backward", attention_varlen_backward_triton, "CUDA")
attention_varlen_forward = without_autograd(torch.ops.fastgpt.attention_varlen_forward.default)
attention_varlen_backward = without_autograd(torch.ops.fastgpt.attention_varlen_backward.default)
