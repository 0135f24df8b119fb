"""PyTorch's scaled_dot_product_attention by fastgpt's kernels: as a function, and in place of PyTorch's wherever it is called.

What the kernels do not take is served, or refused with an error, by PyTorch's own: `fastgpt.explain` says why.
"""

import contextlib
import functools
import math
import sys
import threading
import warnings

import torch
import torch.nn.functional as F

from fastgpt.ops.attention import attention
from fastgpt.ops.attention.checks import KERNEL_DTYPES, MAX_HEAD_DIM, triton_refuses_head_dims
from fastgpt.ops.derivatives import transforms_active
from fastgpt.ops.dropout import keep_mask
from fastgpt.ops.explain import OPERATIONS
from fastgpt.ops.implementations import runs_elsewhere, triton_unusable
from fastgpt.ops.library import without_autograd

_attention_forward = without_autograd(torch.ops.fastgpt.attention_forward.default)
_attention_backward = without_autograd(torch.ops.fastgpt.attention_backward.default)

LARGEST_SCALE = torch.finfo(torch.float32).max

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by fastgpt's kernels where they can serve the call.

    Signature, results, strides and errors are PyTorch's. Dropout draws other numbers from the same distribution; their
    seed comes from the generator of query's device.

    Args:
        query: (..., H, T, E), or (N, T, E) or (T, E).
        key, value: (..., H, S, E) and (..., H, S, Ev); with enable_gqa of fewer heads, whose number divides H.
        attn_mask: bool (True attends) or floating point (added to the scores; differentiable), broadcastable to
            (..., H, T, S), or one of torch.nn.attention.bias.
        is_causal: top-left aligned: query i sees key j when j <= i. T=2, S=3 attends  1 0 0
                                                                                       1 1 0
        The rest: as PyTorch documents it.

    Returns: (..., H, T, Ev). A query that sees no key gets zeros, and gives zero gradients.
    Raises: what PyTorch's function raises.
    """
    call = _prepared(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = _serve(*call)
    if out is None:
        *call, scale, enable_gqa = call
        return F.scaled_dot_product_attention(*call, scale=scale, enable_gqa=enable_gqa)
    return out


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call. "torch" is PyTorch's own function."""
    call = _prepared(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    reason = _refuses(*call)
    if reason is not None:
        return {"cpp": reason, "triton": reason, "torch": "chosen"}
    if query.is_cpu:
        return {"cpp": "chosen", "triton": runs_elsewhere("CUDA", "query", query.device), "torch": "available"}
    return {"cpp": runs_elsewhere("CPU", "query", query.device), "triton": "chosen", "torch": "available"}


OPERATIONS[scaled_dot_product_attention] = explain


def _prepared(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The call as it gets to PyTorch's kernels: in autocast's dtype, and with is_causal for a CausalBias that is that."""
    compiling = torch.compiler.is_dynamo_compiling()
    if attn_mask is not None and type(attn_mask) not in _PLAIN and not compiling:
        bias = sys.modules.get("torch.nn.attention.bias")  # slow to import, and what is not imported is not in use
        if bias is not None and isinstance(attn_mask, bias.CausalBias) and not is_causal:
            if attn_mask.variant == bias.CausalVariant.UPPER_LEFT or attn_mask.seq_len_q == attn_mask.seq_len_kv:
                attn_mask, is_causal = None, True
    if compiling or torch._C._is_any_autocast_enabled():
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def _autocast(query, *others):
    if not isinstance(query, torch.Tensor) or not (query.is_cpu or query.is_cuda):
        return query, *others
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, *others
    dtype = torch.get_autocast_dtype(device)

    def cast(x):
        eligible = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible and x.device.type == device else x

    return tuple(cast(x) for x in (query, *others))


def _serve(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, differentiable=True
):
    """The result, or None where PyTorch's own function must serve the call.

    differentiable: if gradients are asked for, they are this function's to provide.
    """
    call = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if _refuses_surroundings(*call) is not None:
        return None
    out = _serve_common(*call, differentiable)
    if out is None and _refuses_arguments(*call) is None:
        out = _serve_any(*call, differentiable)
    return out


def _serve_common(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, differentiable):
    """The same of the common call on a CPU: in less than half the time, since the operation checks for itself.

    None also where that takes more than is here.
    """
    if differentiable and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if (
        torch.compiler.is_dynamo_compiling()
        or not query.is_cpu
        or query.dim() != 4
        or query.dtype not in KERNEL_DTYPES
        or dropout_p != 0
    ):
        return None
    _, H, T, E = query.shape
    keys = key.shape
    if E < 2 or keys[:3] != value.shape[:3] or not (T and keys[2]) or (keys[1] != H and not enable_gqa):
        return None
    options = {}
    if attn_mask is not None:
        if is_causal or attn_mask.dim() not in (2, 4) or attn_mask.requires_grad:
            return None
        options = {"mask" if attn_mask.dtype is torch.bool else "bias": attn_mask}
    elif is_causal and T != keys[2]:
        return None
    try:
        out, _ = _attention_forward(query, key, value, is_causal, E**-0.5 if scale is None else scale, **options)
    except (RuntimeError, TypeError, ValueError):
        return None
    return _in_order_of(query, out) if value.shape[3] == E else out.contiguous()  # as PyTorch's unfused function


def _refuses(*call) -> str | None:
    """Why PyTorch's own function must serve the call, or None."""
    reason = _refuses_surroundings(*call)
    return _refuses_arguments(*call) if reason is None else reason


def _refuses_surroundings(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> str | None:
    if torch.compiler.is_dynamo_compiling():  # a graph has nothing of the kind
        return None
    for x in (query, key, value) if attn_mask is None else (query, key, value, attn_mask):
        if type(x) not in _PLAIN:
            return f"it takes torch.Tensor, and there is a {type(x).__name__}"
        if x.is_nested or x.layout is not torch.strided:
            return "it takes dense tensors"
    if (
        type(dropout_p) not in (float, int)
        or type(is_causal) is not bool
        or type(scale) not in (type(None), float, int)
        or type(enable_gqa) is not bool
    ):
        return "dropout_p, is_causal, scale or enable_gqa is of a type that PyTorch converts or rejects"
    if torch._C._len_torch_dispatch_stack():
        return "a mode of __torch_dispatch__ is active, which is to see PyTorch's operators"
    if transforms_active():
        return "a transform of torch.func or forward-mode differentiation is active"
    if not torch._C._get_flash_sdp_enabled():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel, torch.backends.cuda.enable_flash_sdp)"
    return None


def _refuses_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> str | None:
    if scale is not None and not abs(scale) <= LARGEST_SCALE:
        return f"scale is {scale}, which is no finite number in fp32"
    dtype = query.dtype
    if dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and query is {dtype}"
    if key.dtype is not dtype or value.dtype is not dtype:
        return f"query, key and value are {dtype}, {key.dtype} and {value.dtype}"
    if not (query.is_cpu or query.is_cuda):
        return f"it runs on CPU and CUDA tensors, and query is on {query.device}"
    if key.device != query.device or value.device != query.device:
        return f"query, key and value are on {query.device}, {key.device} and {value.device}"
    if query.is_cuda and (reason := triton_unusable(query.device)) is not None:
        return reason
    reason = _refuses_shapes(query.shape, key.shape, value.shape, is_causal, enable_gqa)
    if reason is None and query.is_cuda:
        gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        reason = triton_refuses_head_dims(query, value, gradients)
    if reason is not None:
        return reason
    if not 0 <= dropout_p < 1:
        return f"it takes 0 <= dropout_p < 1, and dropout_p is {dropout_p}"
    return None if attn_mask is None else _refuses_mask(query, key.shape[-2], attn_mask, is_causal)


def _refuses_shapes(q, k, v, is_causal, enable_gqa) -> str | None:
    dims = len(q)
    if dims < 2 or len(k) != dims or len(v) != dims:
        return "query, key and value have fewer than two dimensions, or not the same number"
    if q[:-3] != k[:-3] or q[:-3] != v[:-3]:
        return "query, key and value have different batch sizes"
    if dims == 3 and not q[0] == k[0] == v[0] or dims < 4 and enable_gqa:
        return "query, key and value have different batch sizes, or enable_gqa is given without a dimension of heads"
    if dims >= 4:
        H, H_kv = q[-3], k[-3]
        if v[-3] != H_kv or (H != H_kv and H_kv != 1 and (not enable_gqa or H_kv == 0 or H % H_kv)):
            return f"query, key and value have {H}, {H_kv} and {v[-3]} heads, enable_gqa is {enable_gqa}"
    if k[-2] != v[-2] or q[-1] != k[-1]:
        return f"query, key and value end in {tuple(q[-2:])}, {tuple(k[-2:])} and {tuple(v[-2:])}"
    if not 1 <= q[-1] <= MAX_HEAD_DIM or not 1 <= v[-1] <= MAX_HEAD_DIM:
        return f"it takes head dims from 1 to {MAX_HEAD_DIM}, and those are {q[-1]} and {v[-1]}"
    if k[-2] == 0 or math.prod(q) == 0:
        return "there is nothing to compute"
    # What the kernels would be made to serve in a longer time.
    if is_causal and q[-2] > k[-2]:
        return "is_causal with more queries than keys takes two calls"
    return None


def _refuses_mask(query, S, attn_mask, is_causal) -> str | None:
    if is_causal:
        return "attn_mask and is_causal are both given"
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"it takes an attn_mask in bool, the dtype of query or fp32, and that is {attn_mask.dtype}"
    if attn_mask.device != query.device:
        return f"attn_mask is on {attn_mask.device}, and query on {query.device}"
    sizes, wholes = tuple(attn_mask.shape), (*query.shape[:-1], S)
    if not 2 <= len(sizes) <= len(wholes) or any(
        size not in (1, whole) for size, whole in zip(reversed(sizes), reversed(wholes))
    ):
        return f"it takes an attn_mask of at least two dimensions that broadcasts to {wholes}, and that is {sizes}"
    return None


def _serve_any(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, differentiable):
    """The result of a call that is not refused."""
    E, Ev = query.shape[-1], value.shape[-1]
    # Whether PyTorch's fused kernel would have taken the call: the strides of its results are others.
    fused = (
        query.dim() == 4
        and E == Ev
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (key.shape[1] == query.shape[1] or enable_gqa)
        and (dropout_p == 0 or query.is_cuda)
        and (attn_mask is None or (attn_mask.dim() != 3 and not attn_mask.requires_grad))
    )
    q, k, v, mask = query, key, value, attn_mask
    if query.dim() != 4:
        q, k, v, mask = _in_four_dimensions(query, key, value, attn_mask)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    T = q.shape[2]
    if is_causal and T < k.shape[2]:  # no query sees the other keys
        k, v = k[:, :, :T], v[:, :, :T]
    bias = None
    if mask is not None and mask.dtype is not torch.bool:
        mask, bias = None, mask
    scale = E**-0.5 if scale is None else scale
    out = _attention(q, k, v, bias, mask, is_causal, scale, dropout_p, differentiable)
    if fused:
        return _in_order_of(query, out)
    out = out.reshape(*query.shape[:-1], Ev)
    # The unfused function does not need its result for gradients, so it may be written to: that of ours may not.
    return out.clone(memory_format=torch.contiguous_format) if out.requires_grad else out.contiguous()


def _in_four_dimensions(query, key, value, attn_mask):
    """The same as (B, H, T, E) and so on."""
    if query.dim() > 4:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
        return query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4), attn_mask
    if query.dim() == 2:
        return query[None, None], key[None, None], value[None, None], attn_mask
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask


def _in_order_of(query, out):
    """out, which is (B, T, H, E) in memory, as PyTorch's fused kernel returns it: its dimensions in query's order."""
    batch, heads, tokens, _ = query.stride()
    if batch >= tokens >= heads or not (torch.compiler.is_dynamo_compiling() or _fused_follows_query()):
        return out
    like = torch.empty_like(query)
    return out if like.stride() == out.stride() else like.copy_(out)


@functools.cache
def _fused_follows_query() -> bool:
    """False for older versions of PyTorch, whose fused kernel returns (B, T, H, E) in memory whatever query is."""
    x = torch.zeros(1, 2, 2, 8, dtype=torch.float64, device="cpu")  # which is PyTorch's to serve
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0].is_contiguous()


def _attention(q, k, v, bias, mask, causal, scale, dropout_p, differentiable):
    """`fastgpt.attention` of what has been checked."""
    if torch.compiler.is_dynamo_compiling():
        return attention(q, k, v, causal=causal, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    arguments = (q, k, v, bias, mask, seed, causal, scale, dropout_p)
    if differentiable and torch.is_grad_enabled():
        return _Attention.apply(*arguments)
    return _forward(*arguments)[0]


def _forward(q, k, v, bias, mask, seed, causal, scale, dropout_p):
    return _attention_forward(q, k, v, causal, scale, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed)


class _Attention(torch.autograd.Function):
    """The operation with its gradients. A gradient of these is that of PyTorch's unfused function."""

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, seed, *options):
        out, lse = _forward(q, k, v, bias, mask, seed, *options)
        ctx.save_for_backward(q, k, v, bias, mask, seed, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bias, mask, seed, out, lse = ctx.saved_tensors
        causal, scale, dropout_p = ctx.options
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or transforms_active():  # create_graph, forward mode, a vmap over dout
            grads = _differentiable_gradients(dout, (q, k, v, bias), needed, mask, seed, causal, scale, dropout_p)
        else:
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            *grads, _ = _attention_backward(
                dout, None, out, lse, needed[3], q, k, v, causal, scale,
                mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed,
            )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needed)), None, None, None, None, None


def _differentiable_gradients(dout, inputs, needed, mask, seed, causal, scale, dropout_p):
    with torch.enable_grad():
        # Aliases: where two inputs are one tensor, each has a gradient of its own.
        q, k, v, bias = aliases = [None if x is None else x.view_as(x) for x in inputs]
        kept = None if seed is None else keep_mask(seed, dropout_p, *q.shape[:3], k.shape[2], q.device)
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask if bias is None else bias, dropout_p, causal, kept, scale=scale, enable_gqa=True
        )
    wanted = [x for x, need in zip(aliases, needed) if need]
    grads = iter(torch.autograd.grad(out, wanted, dout, create_graph=torch.is_grad_enabled()))
    return [next(grads) if need else None for need in needed]


class enabled(contextlib.ContextDecorator):
    """While one is open, PyTorch's scaled_dot_product_attention is served by fastgpt, on CPU and CUDA, in the whole process.

        with fastgpt.integrations.sdpa.enabled():
            model.generate(...)

    Also a decorator. May be nested, and opened in several threads: it holds until the last one is left, however that
    happens. Every call is reached, whatever name the function was imported by before: from Python, TorchScript, C++; in
    threads that autograd starts, and in processes forked inside. On CPU also graphs of torch.compile, whenever compiled:
    what runs inside is served, but for calls with dropout, which PyTorch has broken down further there. On CUDA these keep
    what they were compiled with; see fastgpt.integrations.flash_provider.

    If a forward pass with activation checkpointing runs inside, its backward pass must, too: it runs the forward again.

    The first one to be opened hooks PyTorch's dispatcher, below autocast and above autograd, which costs a call of attention
    about a microsecond inside, and others nothing. The hook stays, because taking it out would crash a thread in the middle
    of a call: afterwards it hands over to PyTorch's own function, which takes 6 to 8 microseconds a call. `remove_hook` ends
    that.
    """

    _lock = threading.Lock()
    _open = 0
    _library = None

    def __enter__(self) -> "enabled":
        with enabled._lock:
            if enabled._library is None:
                enabled._library = _hook()
            enabled._open += 1
        return self

    def __exit__(self, *exception) -> None:
        with enabled._lock:
            enabled._open -= 1


def remove_hook() -> None:
    """Takes out what `enabled` put into PyTorch's dispatcher. No other thread may be in a call of attention meanwhile.

    Raises: RuntimeError while an `enabled` is open.
    """
    with enabled._lock:
        if enabled._open:
            raise RuntimeError("remove_hook: expected no open `enabled`, got one")
        enabled._library = None  # the only reference


def _hook():
    fused = "_scaled_dot_product_flash_attention_for_cpu"  # what graphs and transforms break the function down to
    hooks = [(fused, "CPU", _serve_fused), (f"{fused}_backward", "CPU", _serve_fused_backward)]
    for device in ("CPU", "CUDA"):
        # Inference tensors, and callers that see to gradients, have no autograd key.
        hooks.append(("scaled_dot_product_attention", device, functools.partial(_serve, differentiable=False)))
        hooks.append(("scaled_dot_product_attention", f"Autograd{device}", _serve))
    originals = [torch.library.get_kernel(f"aten::{operator}", key) for operator, key, _ in hooks]
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of kernels that are overridden
        for (operator, key, serve), original in zip(hooks, originals):
            library.impl(operator, functools.partial(_hooked, serve, original), key, with_keyset=True)
    return library


def _hooked(serve, original, keyset, *args, **options):
    if enabled._open:
        results = serve(*args, **options)
        if results is not None:
            return results
    return original.call_boxed(keyset, *args, **options)


def _serve_fused(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if _refuses_fused(query, key, value, attn_mask, dropout_p, is_causal, scale):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _attention_forward(query, key, value, is_causal, scale, bias=attn_mask)
    if attn_mask is not None:  # PyTorch's gradient, should that be called, takes 0 where no key is seen
        lse.masked_fill_(lse == -math.inf, 0.0)
    return _in_order_of(query, out), _token_major(lse)


def _serve_fused_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    if _refuses_fused(query, key, value, attn_mask, dropout_p, is_causal, scale):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grads = _attention_backward(grad_out, None, out, logsumexp, False, query, key, value, is_causal, scale, bias=attn_mask)
    return tuple(_token_major(x) for x in grads[:3])


def _refuses_fused(query, key, value, attn_mask, dropout_p, is_causal, scale):
    """The same of the fused operator, whose callers have not arranged what `_serve_any` does."""
    return (
        _refuses(query, key, value, attn_mask, dropout_p, is_causal, scale, True)
        or query.dim() != 4
        or value.shape[-1] != query.shape[-1]
        or dropout_p > 0
        or (is_causal and query.shape[2] != key.shape[2])
        or (attn_mask is not None and attn_mask.dtype is torch.bool)
        or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


def _token_major(x):
    """x, (B, H, T, ...), with T before H in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
