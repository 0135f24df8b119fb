"""Random valid calls of every operation, for fuzz_operations.py. Each function returns (operation, reference, arguments); if an
`impl` is drawn, it can serve the call."""

import inspect
import random

import numpy as np
import torch

import fastgpt
from fastgpt.ops import experts as mixtures
from fastgpt.ops.decode_step import embed
from fastgpt.ops.linear import ACTIVATION_NUMBERS

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
    seed = draw.integer(0, 2**31)

    def differentiable(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout is torch.strided

    def differentiated(function):
        def run(**call):
            names = [name for name in ("q", "k", "v", "bias", "sinks") if differentiable(call.get(name))]
            leaves = [call[name].detach().clone().requires_grad_() for name in names]
            out = function(**call | dict(zip(names, leaves)))
            out = out[0] if isinstance(out, tuple) else out  # of a call that asks for lse, too
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
            gradients = torch.autograd.grad(out, leaves, dout)
            if not out.isfinite().all():  # they are then as good as any
                gradients = [torch.zeros_like(x) for x in gradients]
            return out.detach(), *gradients

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
    if draw.chance(0.2):
        options["bias"] = draw.numbers(*(draw.choice([size, 1]) for size in (B, H, T, capacity)), dtype=dtype)
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


def moe(draw):
    dtype = draw.choice([*FLOATS, torch.float64])
    rows = draw.choice([(), (0,), (1,), (2, 3), (33,), (150,)])
    E, C, I, gated = draw.choice([1, 4, 9]), draw.choice([1, 8, 33, 128]), draw.choice([0, 1, 5, 64, 65]), draw.chance(0.7)
    K, features = draw.integer(1, min(E, 4)), 2 * I if gated else I
    experts = torch.randint(0, E, (*rows, K), dtype=draw.choice([torch.int32, torch.int64]))
    call = {
        "x": draw.numbers(*rows, C, dtype=dtype), "experts": draw.laid_out(experts),
        "weights": draw.numbers(*rows, K, dtype=torch.promote_types(dtype, torch.float32)),
        "up": draw.numbers(E, features, C, dtype=dtype), "down": draw.numbers(E, C, I, dtype=dtype),
    }  # fmt: skip
    for name, size in (("up_bias", (E, features)), ("down_bias", (E, C)), ("residual", (*rows, C))):
        if draw.chance(0.3):
            call[name] = draw.numbers(*size, dtype=dtype)
    activations = mixtures.ACTIVATION_NUMBERS if gated else ACTIVATION_NUMBERS
    call |= {"gated": gated, "activation": draw.choice(list(activations))}
    return fastgpt.moe, fastgpt.moe_reference, call


def route(draw):
    """Of logits that are not too close to each other for fp32 to tell their order."""
    dtype, groups, size = draw.choice([*FLOATS, torch.float64]), draw.choice([1, 1, 2, 4]), draw.choice([1, 2, 5, 16])
    rows, top_groups = draw.choice([(), (0,), (1,), (2, 3), (33,)]), draw.integer(1, groups)
    call = {
        "logits": draw.laid_out(torch.randn(*rows, groups * size).to(dtype)), "top_k": draw.integer(1, top_groups * size),
        "scoring": draw.choice(["softmax", "sigmoid"]), "num_groups": groups, "top_groups": top_groups,
        "group_score": draw.choice(["max", "top2"]) if size > 1 else "max", "normalize": draw.chance(0.5),
        "scale": draw.choice([1.0, 1, 2.5, np.float32(0.5)]),
    }  # fmt: skip
    if draw.chance(0.4):
        call["selection_bias"] = draw.laid_out(torch.randn(groups * size, dtype=torch.promote_types(dtype, torch.float32)))

    def with_indices_as_numbers(function):
        def run(**call):
            experts, weights = function(**call)
            return experts.double(), weights

        run.__signature__ = inspect.signature(function)
        return run

    return with_indices_as_numbers(fastgpt.route), with_indices_as_numbers(fastgpt.route_reference), call


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
    attention_with_kv_cache, linear, moe, route, norm, embedding,
]  # fmt: skip
