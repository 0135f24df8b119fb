"""Random calls of every operation, good and bad ones.

Of a good call the value agrees with the reference, or of a cache every bit is the reference's. Of a bad one, whatever has been
made of one of its arguments, a TypeError or ValueError begins with the name of an argument and no tensor has changed; and an
operation refuses what its reference refuses, nothing else. `torch.ops.fastgpt`, called with the same, does not crash.

    python tests/ops/fuzz_operations.py --seed 1 --calls 3000 [--first 0] [--now FILE]

Call i of a seed is always the same one. FILE holds the call that is being made, for whoever finds the process dead.
"""

import argparse
import faulthandler
import functools
import inspect
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from fastgpt._C import OutOfPages, PageAllocator

import fastgpt
from fastgpt.ops.decode_step import embed
from fastgpt.ops.linear import ACTIVATION_NUMBERS
from fastgpt.testing import numerics

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NOT_FLOATS = (torch.int8, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64)
SENTINEL = -77.0


class Draw:
    """What one call is made of."""

    def __init__(self, seed: int, number: int):
        self.random = random.Random(f"{seed} {number}")
        torch.manual_seed(self.random.getrandbits(60))
        self.choice, self.integer = self.random.choice, self.random.randint

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def numbers(self, *shape, dtype=torch.float32):
        """Normal random numbers; now and then small, large, subnormal or all the same. Last dimension contiguous, others in
        any layout."""
        x = torch.randn(shape)
        scale = self.choice([1.0] * 8 + [0.0, 1e-3, 30.0, 1e-41])
        return self.laid_out((x * scale).to(dtype))

    def laid_out(self, x):
        layout = self.choice(["contiguous", "contiguous", "permuted", "padded", "offset", "negative", "inference"])
        if layout == "permuted" and x.dim() > 2:
            order = list(range(x.dim() - 1))
            self.random.shuffle(order)
            order.append(x.dim() - 1)
            back = [order.index(i) for i in range(x.dim())]
            return x.permute(order).contiguous().permute(back)
        if layout == "padded" and x.dim() > 0:
            wide = torch.full((*x.shape[:-1], x.shape[-1] + self.integer(1, 9)), torch.nan).to(x.dtype)
            wide[..., : x.shape[-1]] = x
            return wide[..., : x.shape[-1]]
        if layout == "offset":
            return torch.cat([x.new_zeros(self.integer(1, 5)), x.flatten()])[-x.numel() :].view(x.shape) if x.numel() else x
        if layout == "negative" and x.is_floating_point():
            return torch._neg_view(-x)
        if layout == "inference":
            with torch.inference_mode():
                return x.clone()
        return x


# Good calls: each returns (operation, reference, arguments), and where `impl` is drawn it may serve the call.


def attention_options(draw, B, H, T, S, dtype, packed=False):
    options = {"causal": draw.chance(0.6)}
    if draw.chance(0.3):
        options["scale"] = draw.choice([0.0, 0.3, 1, -0.5, np.float32(0.7)])
    if draw.chance(0.3):
        options["window"] = draw.choice([1, 2, max(S // 2, 1), S + 5, 2**31, 2**63 - 1, np.int64(3)])
    if draw.chance(0.2):
        options["softcap"] = draw.choice([0.5, 3, 50.0, 2.0**-126])
    if draw.chance(0.2):
        options["alibi_slopes"] = torch.rand(H)
    if draw.chance(0.2):
        options["sinks"] = draw.numbers(H, dtype=draw.choice([*FLOATS, torch.float64]))
    if draw.chance(0.15):
        options |= {"dropout_p": draw.choice([0.0, 0.4]), "dropout_seed": draw.choice([7, torch.tensor([2**40])])}
    if packed:
        return options

    def sizes():
        full = [draw.choice([size, size, 1]) for size in (B, H, T, S)]
        return full[draw.choice([0, 0, 1, 2, 3]) :]

    if draw.chance(0.2):
        options["mask"] = torch.rand(sizes()) < draw.choice([0.1, 0.7])
    if draw.chance(0.25):
        options["bias"] = draw.numbers(*sizes(), dtype=draw.choice([dtype, torch.float32]))
        if draw.chance(0.6):
            hidden = torch.rand(options["bias"].shape) < draw.choice([0.3, 1.0])
            options["bias"] = options["bias"].masked_fill(hidden, -torch.inf)
    if draw.chance(0.3):
        options["kv_lengths"] = torch.randint(-2, S + 3, (B,), dtype=torch.int32)
    return options


def shape(draw):
    """B, H, H_kv, T, S, D"""
    H_kv = draw.integer(1, 3)
    B, T = draw.choice([0, 1, 1, 2, 3]), draw.choice([0, 1, 1, 2, 3, 9, 17, 66])
    return B, H_kv * draw.integer(1, 3), H_kv, T, draw.choice([0, 1, 3, 16, 64, 65, 130]), draw.choice([1, 8, 16, 24, 33, 64])


def of_values(draw, D):
    """The head dim of values."""
    return draw.choice([D, D, draw.choice([1, 8, 16, 24, 33, 64])])


def paged(draw, k, v, scales):
    """Keys and values as pools of pages, and their table."""
    page, (B, H, S, _) = draw.choice([1, 4, 16]), k.shape
    k, v, *scales = (x.resolve_neg() for x in (k, v, *scales))
    pages = -(-S // page)
    table = torch.randperm(B * pages + 2)[: B * pages].view(B, pages)
    pools = []
    for x in (k, v, *scales):
        pool = torch.zeros(B * pages + 2, H, page, *x.shape[3:]).to(x.dtype)
        for b in range(B):
            for i in range(pages):
                rows = x[b, :, i * page : (i + 1) * page].view(torch.uint8 if x.itemsize == 1 else x.dtype)
                pool.view(rows.dtype)[table[b, i], :, : rows.shape[1]] = rows
        pools.append(pool)
    return (*pools, table.int())


def quantized(x, dtype):
    return (x.clamp(-2, 2) * 60).to(dtype), torch.rand(x.shape[:3]) + 0.5


def attention(draw):
    B, H, H_kv, T, S, D = shape(draw)
    dtype = draw.choice([*FLOATS, torch.float64])
    call = {"q": draw.numbers(B, H, T, D, dtype=dtype)}
    options = attention_options(draw, B, H, T, S, dtype)
    k, v = (draw.numbers(B, H_kv, S, size, dtype=dtype) for size in (D, of_values(draw, D)))
    if draw.chance(0.4):
        k, v = poisoned(draw, k, v, options)
    scales = ()
    if draw.chance(0.2):
        cache_dtype = draw.choice([torch.int8, torch.float8_e4m3fn])
        (k, *k_scale), (v, *v_scale) = quantized(k.nan_to_num(), cache_dtype), quantized(v.nan_to_num(), cache_dtype)
        scales = (*k_scale, *v_scale)
    if draw.chance(0.2):
        k, v, *scales, table = paged(draw, k, v, scales)
        options["block_table"] = table
        pages = table.shape[1] * k.shape[2]
        for name in {"mask", "bias"} & options.keys():  # of the capacity, which is more than S
            options[name] = (
                torch.nn.functional.pad(options[name].float(), (0, pages - S)).to(options[name].dtype)
                if options[name].dim() and options[name].shape[-1] == S and S != 1
                else options[name][..., :1]
            )
    call |= {"k": k, "v": v, **options}
    if scales:
        call |= dict(zip(("k_scale", "v_scale"), scales))
    call["return_lse"] = True
    return fastgpt.attention, fastgpt.attention_reference, call


def poisoned(draw, k, v, options):
    """k and v with what is not finite where no query, or not every query, sees it."""
    B, _, S, _ = k.shape
    if S == 0:
        return k, v
    k, v = k.clone(), v.clone()
    what = draw.choice([torch.nan, torch.inf, -torch.inf])
    if "kv_lengths" in options:
        for b, length in enumerate(options["kv_lengths"].tolist()):
            k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = what
    else:
        key = draw.integer(0, S - 1)
        if draw.chance(0.5):
            hidden = torch.zeros(S).masked_fill(torch.arange(S) == key, -torch.inf)
            options["bias"] = options["bias"].float() + hidden if "bias" in options and options["bias"].dim() else hidden
            k[:, :, key] = what
        v[:, :, key] = what
    return k, v


def attention_gradients(draw):
    B, H, H_kv, T, S, D = shape(draw)
    dtype = draw.choice(FLOATS)
    options = attention_options(draw, B, H, T, S, dtype)
    options.pop("dropout_seed", None), options.pop("dropout_p", None)
    k, v = (draw.numbers(B, H_kv, S, size, dtype=dtype) for size in (D, of_values(draw, D)))
    if draw.chance(0.3):
        k, v = (x.clone() for x in (k, v))
        lengths = options.setdefault("kv_lengths", torch.randint(0, S + 1, (B,), dtype=torch.int32))
        for b, length in enumerate(lengths.tolist()):
            k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = torch.nan
    call = {"q": draw.numbers(B, H, T, D, dtype=dtype), "k": k, "v": v, **options}
    dout = torch.randn(B, H, T, v.shape[-1])

    def differentiable(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout is torch.strided

    def differentiated(function):
        def run(**call):
            names = [name for name in ("q", "k", "v", "bias", "sinks") if differentiable(call.get(name))]
            leaves = [call[name].detach().clone().requires_grad_() for name in names]
            out = function(**call | dict(zip(names, leaves)))
            out = out[0] if isinstance(out, tuple) else out  # of a call that asks for lse, too
            return torch.autograd.grad(out, leaves, dout.to(out.dtype))

        run.__signature__ = inspect.signature(function)
        return run

    return differentiated(fastgpt.attention), differentiated(fastgpt.attention_reference), call


def attention_varlen(draw):
    _, H, H_kv, _, _, D = shape(draw)
    dtype = draw.choice(FLOATS)
    lengths = [[draw.choice([0, 1, 2, 9, 40]) for _ in range(draw.integer(1, 4))] for _ in range(2)]
    lengths[1] = (lengths[1] * 4)[: len(lengths[0])]
    starts = [torch.tensor([0, *x]).cumsum(0).int() for x in lengths]
    total_q, total_k = sum(lengths[0]), sum(lengths[1])
    call = {
        "q": draw.numbers(total_q, H, D, dtype=dtype), "k": draw.numbers(total_k, H_kv, D, dtype=dtype),
        "v": draw.numbers(total_k, H_kv, of_values(draw, D), dtype=dtype), "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1],
        "max_seqlen_q": max(lengths[0]) + draw.integer(0, 2), "max_seqlen_k": max(lengths[1]),
        **attention_options(draw, 1, H, total_q, total_k, dtype, packed=True), "return_lse": True,
    }  # fmt: skip
    return fastgpt.attention_varlen, fastgpt.attention_varlen_reference, call


def update(draw):
    """Arguments of kv_cache_update, and of a rotation."""
    B, H, H_kv, T, S, D = shape(draw)
    dtype = draw.choice([*FLOATS, torch.float64])
    sizes = {"k": D, "v": of_values(draw, D)}
    call = {name: draw.numbers(B, H_kv, T, size, dtype=dtype) for name, size in sizes.items()}
    first, rows = B, S
    if draw.chance(0.3):
        page = draw.choice([1, 4, 16])
        first, rows = B * -(-S // page) + 1, page
        call["block_table"] = torch.randperm(first)[: B * -(-S // page)].view(B, -(-S // page)).int()
    cache_dtype = draw.choice([dtype, dtype, torch.int8, torch.float8_e4m3fn])
    layout = draw.choice(["apart", "token-major", "interleaved"])
    for name, size in sizes.items():
        call[f"{name}_cache"] = torch.full((first, H_kv, rows, size), SENTINEL).to(cache_dtype)
    if layout == "token-major":
        for name, size in sizes.items():
            call[f"{name}_cache"] = torch.full((first, rows, H_kv, size), SENTINEL).to(cache_dtype).transpose(1, 2)
    elif layout == "interleaved":
        both = torch.full((first, rows, H_kv, D + sizes["v"]), SENTINEL).to(cache_dtype).transpose(1, 2)
        call["k_cache"], call["v_cache"] = both[..., :D], both[..., D:]
    if cache_dtype != dtype:
        call |= {name: torch.full((first, H_kv, rows), SENTINEL) for name in ("k_scale", "v_scale")}
    high = S if S else 0
    call["positions"] = torch.randint(-2, max(high, 1), (B, T), dtype=draw.choice([torch.int32, torch.int64]))
    if high == 0:
        call["positions"].fill_(-1)
    if draw.chance(0.2):
        call["k"] = call["k"].clone().masked_fill(torch.rand(call["k"].shape) < 0.01, draw.choice([torch.nan, torch.inf]))
    rotation = {}
    if D > 1:
        pairs, dtype_of_angles = draw.integer(1, D // 2), torch.float32
        rotation = {name: torch.randn(max(high, 1), pairs, dtype=dtype_of_angles) for name in ("cos", "sin")}
        rotation["interleaved"] = draw.chance(0.3)
        if draw.chance(0.2):
            rotation["slots"] = call["positions"].flip(-1)
    return call, rotation, (B, H, T, D, dtype)


def kv_cache_update(draw):
    return fastgpt.kv_cache_update, fastgpt.kv_cache_update_reference, update(draw)[0]


def rope_kv_cache_update(draw):
    call, rotation, (B, H, T, D, dtype) = update(draw)
    if not rotation:
        return fastgpt.kv_cache_update, fastgpt.kv_cache_update_reference, call
    call = {"q": draw.numbers(B, H, T, D, dtype=dtype), **call, **rotation}
    return fastgpt.rope_kv_cache_update, fastgpt.rope_kv_cache_update_reference, call


def attention_with_kv_cache(draw):
    call, rotation, (B, H, T, D, dtype) = update(draw)
    capacity = call["k_cache"].shape[2] * (call["block_table"].shape[1] if "block_table" in call else 1)
    options = attention_options(draw, B, H, T, capacity, dtype, packed=True)
    options.pop("dropout_p", None), options.pop("dropout_seed", None)
    if draw.chance(0.6):
        options["kv_lengths"] = torch.randint(0, capacity + 1, (B,), dtype=torch.int32)
    for name in ("k_scale", "v_scale"):
        if name in call:
            call[name].fill_(0.01)
    call = {"q": draw.numbers(B, H, T, D, dtype=dtype), **call, **(rotation if draw.chance(0.5) else {}), **options}
    call["k"] = call["k"].nan_to_num(0.0, 1.0, -1.0)
    return fastgpt.attention_with_kv_cache, fastgpt.attention_with_kv_cache_reference, call


def linear(draw):
    dtype = draw.choice([*FLOATS, torch.float64])
    rows = draw.choice([(), (0,), (1,), (2, 3), (33,), (5, 9)])
    C, N, gated = draw.choice([0, 1, 8, 33, 128]), draw.choice([0, 1, 5, 64, 65]), draw.chance(0.3)
    of_weight = 2 * N if gated else N
    call = {"x": draw.numbers(*rows, C, dtype=dtype), "weight": draw.numbers(of_weight, C, dtype=dtype)}
    for name, size, chance in (("bias", (of_weight,), 0.4), ("residual", (*rows, N), 0.3), ("norm_weight", (C,), 0.4)):
        if draw.chance(chance):
            call[name] = draw.numbers(*size, dtype=dtype)
    if "norm_weight" in call:
        call |= {"norm": draw.choice(["layer", "rms"]), "norm_eps": draw.choice([1e-5, 1, 1e-2])}
        if draw.chance(0.5):
            call["norm_bias"] = draw.numbers(C, dtype=dtype)
    call |= {"gated": gated, "activation": draw.choice(list(ACTIVATION_NUMBERS)), "norm_offset": draw.choice([0.0, 1, 1.0])}
    return fastgpt.linear, fastgpt.linear_reference, call


def norm(draw):
    dtype = draw.choice([*FLOATS, torch.float64])
    size = (*draw.choice([(), (0,), (1,), (2, 3), (3, 1, 2, 2)]), draw.choice([1, 8, 33, 128]))
    call = {"x": draw.numbers(*size, dtype=dtype), "weight": draw.numbers(size[-1], dtype=dtype)}
    if draw.chance(0.4):
        call["bias"] = draw.numbers(size[-1], dtype=dtype)
    if draw.chance(0.4):
        call["residual"] = draw.numbers(*size, dtype=dtype)
    call |= {"kind": draw.choice(["layer", "rms"]), "eps": draw.choice([1e-5, 1, 1e-2]), "offset": draw.choice([0.0, 1])}
    return fastgpt.norm, fastgpt.norm_reference, call


def embedding(draw):
    B, T, V, C, dtype = draw.integer(0, 3), draw.integer(0, 5), draw.integer(1, 9), draw.integer(0, 9), draw.choice(FLOATS)
    call = {"ids": torch.randint(0, V, (B, T)), "weight": draw.numbers(V, C, dtype=dtype), "scale": draw.choice([None, 2, 0.5])}
    if draw.chance(0.5):
        call |= {"positions": torch.randint(-1, V, draw.choice([(T,), (B, T)])), "position_weight": draw.numbers(V, C)}
    return embed, embed, call


OPERATIONS = [
    attention, attention, attention_gradients, attention_varlen, kv_cache_update, rope_kv_cache_update,
    attention_with_kv_cache, linear, norm, embedding,
]  # fmt: skip


# Bad calls: one argument becomes something else. What is refused in any case is in BAD.


class Stranger:
    """No tensor, number or string."""

    def __repr__(self):
        return "Stranger()"


def meta(x):
    return x.to("meta")


def quantized_tensor(x):
    return torch.quantize_per_tensor(x.detach().float().nan_to_num(), 0.1, 0, torch.qint8)


def sparse(x):
    return torch.zeros(x.shape).to_sparse()


def nested(x):
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged)


def without_storage(x):
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def wider(x):
    return torch.cat([x, x[..., :1]], -1) if x.dim() and x.shape[-1] else x.unsqueeze(0)


def longer(x):
    return torch.cat([x, x[:1]]) if x.dim() and x.shape[0] else x.unsqueeze(-1)


def subclass(x):
    return torch.nn.Parameter(x, requires_grad=False) if x.is_floating_point() else x


def overlapping(x):
    return x.new_zeros(sum(x.shape) + 1).as_strided(x.shape, [1] * x.dim()) if x.numel() else x


TENSORS = [
    *((lambda x, dtype=dtype: x.detach().float().nan_to_num().to(dtype)) for dtype in (*NOT_FLOATS, torch.float64, torch.int32)),
    meta, quantized_tensor, sparse, nested, without_storage, wider, longer, subclass, overlapping,
    lambda x: x.flatten()[0] if x.numel() else x.new_zeros(()), lambda x: x.unsqueeze(0), lambda x: x[:0] if x.dim() else x,
    lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, lambda x: x[0] if x.dim() and len(x) else x,
    lambda x: x.new_zeros(1).expand(x.shape), lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    lambda x: x.neg() if x.dtype != torch.bool else x, lambda x: x + 1 if x.dtype != torch.bool else ~x,
    lambda x: x.detach().float().numpy(), lambda x: x.tolist() if x.numel() < 100 else [1.0], lambda x: None,
    lambda x: "x", lambda x: 1, lambda x: Stranger(), lambda x: torch.complex(x.float(), x.float()).conj(),
]  # fmt: skip
OTHERS = [
    "x", "", None, [], [1], {}, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e-46, 1e-30, 0.5, 1.0, 1e39, 1e300, -1e300,
    float("nan"), float("inf"), -float("inf"), 1j, b"1", Stranger(), np.float32(1), np.int64(2), np.array(1.0), np.ones(3),
    np.bool_(True), torch.tensor(1.0), torch.tensor(2), torch.ones(3), torch.tensor(True), int, Path("x"),
]  # fmt: skip
BAD = {meta, quantized_tensor, sparse, nested}  # of those beside ordinary tensors


def aliased(draw, call):
    """The cache of an update shares memory with another tensor."""
    name = draw.choice(["k", "v", "v_cache", "k_cache"])
    k_cache = call["k_cache"]
    if name == "k_cache":
        return call | {name: k_cache[:1].expand_as(k_cache)}, len(k_cache) < 2
    if name == "v_cache":
        return call | {name: k_cache}, False
    if call[name].dtype != k_cache.dtype or call[name].shape[2] > k_cache.shape[2] or len(k_cache) != len(call[name]):
        return call, True
    return call | {name: k_cache[:, :, : call[name].shape[2]]}, False


def bad(draw, operation, call):
    """(call with one argument that is something else, whether it must be refused, whether the reference may be asked)"""
    if (
        "k_cache" in call
        and draw.chance(0.1)
        and call["k_cache"].dtype in FLOATS
        and call["k_cache"].numel()
        and call["k"].numel()
    ):
        changed, harmless = aliased(draw, call)
        return changed, not harmless, harmless
    name = draw.choice([name for name in inspect.signature(operation).parameters if name != "impl"])
    if name in call and isinstance(call[name], torch.Tensor):
        change = draw.choice(TENSORS)
        try:
            changed = change(call[name])
        except RuntimeError:  # PyTorch cannot do this to such a tensor
            change, changed = None, None
        if change is without_storage:
            lost = isinstance(changed, torch.Tensor) and changed.numel() > 0
            return call | {name: changed}, lost, not lost
        return call | {name: changed}, change in BAD, True
    return call | {name: draw.choice(OTHERS)}, False, True


# Outcomes


class Wrong(Exception):
    """An operation did what it must not."""


def tensors_of(call):
    return {
        name: x for name, x in call.items()
        if isinstance(x, torch.Tensor) and not x.is_nested and x.layout is torch.strided and x.device.type == "cpu"
        and not x.is_quantized
    }  # fmt: skip


def memory_of(call):
    """The bytes of every tensor's storage."""
    storages = {name: x.untyped_storage() for name, x in tensors_of(call).items()}
    return {name: bytes(np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * s.nbytes()).from_address(s.data_ptr())).data)
            if s.nbytes() else b"" for name, s in storages.items()}  # fmt: skip


def copy_of(call):
    """The same call on other memory, which tensors share as they did."""
    storages = {}

    def copied(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        with torch.no_grad():
            y = x.new_empty(0).set_(storages[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())
        y = torch._neg_view(y) if x.is_neg() else y
        return y.requires_grad_(x.requires_grad) if y.is_floating_point() else y

    return call | {name: copied(x) for name, x in tensors_of(call).items()}


def outcome(function, call):
    """(result, None) or (None, error)"""
    try:
        return function(**call), None
    except Exception as error:
        return None, error


def in_double(x):
    return (
        x.to(torch.float64, memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) and x.dtype in FLOATS else x
    )


# What float64 takes beside it: scales and angles are fp32 in any case.
KEPT = ("alibi_slopes", "k_scale", "v_scale", "cos", "sin", "bias")


def exact(call, quantized_cache):
    """The call in float64. Of a cache of 8 bits, nothing but q."""
    kept = (*KEPT, "k_cache", "v_cache", "k", "v") if quantized_cache else KEPT
    return {name: x if name in kept else in_double(x) for name, x in call.items()} | (
        {"bias": call["bias"].double()} if isinstance(call.get("bias"), torch.Tensor) and "bias" in call else {}
    )


def flat(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def check_agreement(result, reference, low, weights):
    """The numerics contract. The errors of the reference in low precision are a yardstick that costs nothing; where a result
    errs by more, simulated arithmetic decides.

    Args:
        reference: a function without arguments that returns what `result` is, in float64.
        low: what the reference returns in the result's precision.
        weights: the dtype that weights of a softmax may be rounded to.
    """
    results, lows, oracles, yardsticks = flat(result), flat(low), flat(reference()), None
    for i, (x, exact, lower) in enumerate(zip(results, oracles, lows, strict=True)):
        if x.shape != exact.shape:
            raise Wrong(f"result {i}: shape {tuple(x.shape)}, the reference's {tuple(exact.shape)}")
        if x.is_meta:
            continue
        dtype = x.dtype
        x, lower, exact = (y.detach().double() for y in (x, lower, exact))
        rounded = exact.to(dtype).double()
        known = exact.isfinite() & rounded.isfinite() & lower.isfinite()
        if (x[~exact.isfinite()].isfinite() & lower[~exact.isfinite()].isinf()).any() or not x[known].isfinite().all():
            raise Wrong(f"result {i}: finite and infinite numbers are not where the reference has them")
        if numerics.share_of_bound(x[known], exact[known], lower[known], dtype=dtype)[0] <= 1:
            continue
        yardsticks = yardsticks or numerics.simulate(lambda: flat(reference()), weights=weights)
        found = numerics.compare(torch.where(known, x, rounded), yardsticks[i], dtype=dtype)
        if not found.share <= 1:
            raise Wrong(f"result {i}: {found}")


def check_caches(call, expected):
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if isinstance(call.get(name), torch.Tensor) and not call[name].is_meta and call[name].numel():
            actual, wanted = (x[name].detach().clone(memory_format=torch.contiguous_format) for x in (call, expected))
            if actual.dtype == wanted.dtype and actual.itemsize > 1 and actual.is_floating_point():
                actual, wanted = (x.masked_fill(x.isnan(), torch.nan) for x in (actual, wanted))  # one NaN is like another
            actual, wanted = actual.view(torch.uint8), wanted.view(torch.uint8)
            if not torch.equal(actual, wanted):
                raise Wrong(f"{name}: {(actual != wanted).sum().item()} bytes are not the reference's")


def check_error(operation, error):
    named = re.match(r"([a-z_]+)\b", str(error))
    if not isinstance(error, (TypeError, ValueError)) or not named or named[1] not in inspect.signature(operation).parameters:
        raise Wrong(f"{type(error).__name__} does not begin with an argument's name: {str(error)[:300]}")


def raw(operation, call):
    """The registered operation and its arguments, where one has the names of the public one."""
    name = {fastgpt.attention: "attention_forward"}.get(operation, operation.__name__)
    if operation is fastgpt.attention_varlen or not hasattr(torch.ops.fastgpt, name) or name == "run":
        return None, None
    function = getattr(torch.ops.fastgpt, name).default
    given = dict(call)
    if name == "attention_forward":
        given.setdefault("scale", 0.3), given.setdefault("causal", True)
        if isinstance(given.get("dropout_seed"), int):
            given["dropout_seed"] = torch.tensor([3])
    if name == "linear" and isinstance(given.get("activation"), str) and given["activation"] in ACTIVATION_NUMBERS:
        given["activation"] = ACTIVATION_NUMBERS[given["activation"]]
    names = [argument.name for argument in function._schema.arguments]
    return function, {name: value for name, value in given.items() if name in names}


def page_allocator(draw):
    """A random life of an allocator: errors name an argument or are OutOfPages, and pages add up."""
    numbers = [-1, 0, 1, 2, 5, 2**31, 2**62, 2**63, 2**64, 1.5, None, "1", True, np.int64(2), [1], Stranger()]
    parameters = {"num_pages", "page_size", "sequence", "sequences", "counts", "length"}

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except OutOfPages:
            return None
        except Exception as error:
            named = re.match(r"[a-z_]+", str(error))
            if not isinstance(error, (TypeError, ValueError)) or not named or named[0] not in parameters:
                raise Wrong(f"{type(error).__name__} does not begin with an argument's name: {str(error)[:300]}") from None
            return None

    attempt(PageAllocator, draw.choice(numbers), draw.choice(numbers))
    allocator = PageAllocator(draw.integer(0, 6), draw.integer(1, 3))
    for _ in range(20):
        sequence = draw.choice([draw.integer(0, 4)] * 3 + numbers)
        for function, arguments in draw.choice([
            [(allocator.allocate, ())], [(allocator.fork, (sequence,))], [(allocator.free, (sequence,))],
            [(allocator.truncate, (sequence, draw.choice(numbers)))], [(allocator.pages, (sequence,))],
            [(allocator.append, (draw.choice([[sequence], [0, 0], sequence]), draw.choice([[draw.choice(numbers)], numbers, 3])))],
        ]):  # fmt: skip
            attempt(function, *arguments)
    statistics = allocator.statistics()
    if statistics["used_pages"] + statistics["free_pages"] != statistics["num_pages"]:
        raise Wrong(f"pages do not add up: {statistics}")


def described(call):
    def show(x):
        if isinstance(x, torch.Tensor) and not x.is_nested:
            strides = tuple(x.stride()) if x.layout is torch.strided else x.layout
            return f"{x.dtype} {tuple(x.shape)} strides {strides} on {x.device}"
        return repr(x)[:80] if not isinstance(x, int) or abs(x) < 2**70 else "a large integer"

    return ", ".join(f"{name}={show(x)}" for name, x in call.items())


def run(seed: int, number: int, note) -> str:
    """Makes one call. Returns what it was: "good", "bad" or "allocator". note: is told of the call before it is made."""
    draw = Draw(seed, number)
    if draw.chance(0.02):
        note("page allocator")
        page_allocator(draw)
        return "allocator"
    operation, reference, call = draw.choice(OPERATIONS)(draw)
    must_fail, comparable, kind = False, True, "good"
    if draw.chance(0.6):
        call, must_fail, comparable = bad(draw, operation, call)
        kind = "bad"
    note(f"{getattr(operation, '__name__', operation)}({described(call)})")
    expected, before = copy_of(call) if comparable else call, memory_of(call)
    if draw.chance(0.15):
        function, arguments = raw(operation, copy_of(call) if comparable else call)
        if function is not None:
            outcome(function, arguments)
            if not comparable and memory_of(call) != before:
                raise Wrong("the registered operation changed a tensor of a call that it must refuse")
    result, error = outcome(operation, call)
    if isinstance(error, RuntimeError) and str(error).startswith("Inference tensors cannot be saved"):  # autograd's own rule
        return kind
    if error is not None:
        if kind == "good":
            raise Wrong(f"a good call raises {type(error).__name__}: {str(error)[:300]}")
        check_error(operation, error)
        if memory_of(call) != before:
            raise Wrong(f"tensors have changed although it raises {error}")
    if not comparable:
        if error is None and operation.__name__ != "run":  # with gradients, which detaches tensors and makes plain ones of them
            raise Wrong("a call that must be refused returns")
        return kind
    if must_fail and error is None:
        raise Wrong("a call that must be refused returns")
    low, refused = outcome(reference, expected)
    if (refused is None) != (error is None):
        raise Wrong(f"it raises {error!r:.300}, the reference {refused!r:.300}")
    if refused is not None:
        check_error(operation, refused)
    elif "k_cache" in call and operation is not fastgpt.attention_with_kv_cache:
        check_caches(call, expected)
        if result is not None and not result.is_meta:
            check_caches({"k_cache": result}, {"k_cache": low})
    elif not any(isinstance(x, torch.Tensor) and x.is_meta for x in call.values()):
        if "k_cache" in call:
            check_caches(call, expected)
            # What was stored is what is read: the oracle attends to these caches and stores nothing.
            exactly = functools.partial(attended, call, result)
        else:
            cache_of_8_bits = isinstance(call.get("k"), torch.Tensor) and call["k"].itemsize == 1
            exactly = functools.partial(reference, **exact(copy_of(call), cache_of_8_bits))
            _, refused = outcome(exactly, {})
            if refused is not None:
                raise Wrong(f"the reference in float64 raises {refused!r:.300}")
        check_agreement(result, exactly, low, weights=flat(result)[0].dtype)
    return kind


def attended(call, result):
    """The attention of attention_with_kv_cache in float64, to caches that hold the new tokens."""
    q = call["q"]
    if call.get("cos") is not None:
        rotation = {name: call[name] for name in ("positions", "cos", "sin")} | {"interleaved": call.get("interleaved", False)}
        q = fastgpt.ops.kv_cache_update.rope_reference(q, **rotation)
    names = inspect.signature(fastgpt.attention).parameters
    options = {name: x for name, x in call.items() if name in names and name not in ("q", "k", "v")}
    caches = call["k_cache"], call["v_cache"]
    return fastgpt.attention_reference(q.double(), *(x if x.itemsize == 1 else x.double() for x in caches), **options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--now", type=Path)
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    arguments = parser.parse_args()
    faulthandler.enable()
    torch.set_warn_always(False)
    now = arguments.now.open("w") if arguments.now else None
    counts, failures = {}, 0
    for number in range(arguments.first, arguments.first + arguments.calls):
        text = ""

        def note(call, number=number):
            nonlocal text
            text = f"seed {arguments.seed}, call {number}: {call}"
            if now:
                now.seek(0), now.truncate(), now.write(text), now.flush()

        try:
            kind = run(arguments.seed, number, note)
            counts[kind] = counts.get(kind, 0) + 1
        except Wrong as error:
            failures += 1
            print(f"{text}\n    {error}", flush=True)
            if not arguments.all:
                sys.exit(1)
    print(f"{arguments.calls} calls: {counts}, {failures} wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
