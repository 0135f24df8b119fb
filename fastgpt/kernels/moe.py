"""Mixtures of experts: the choice of experts in one launch; their MLPs for few rows in two launches, for many in a few.

    h   = activation(up[e] x + up_bias[e])                                   for each e = experts[k]
    out = residual + sum over k of weights[k] · (down[e] h + down_bias[e])

Few rows are bound by reading the weights of the experts that they are routed to: a program reads some rows of one expert's `up`
and writes features of h, in fp32; then a program reads some rows of `down` of all experts of a row of x, and adds up their products
in the order of k. Many rows are sorted by expert, and the products of each expert's rows are tiles of BLOCK_M of them: how many
tiles an expert has is known only on the GPU, so there are as many programs as there can be tiles. Nothing waits for the GPU, and
no sum depends on the order of programs. An expert that does not exist, whose index is below 0 or above the last, adds nothing.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, kernel
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.linear import INTERPRETED, activate, masked_load, rows_of, unit_of
from fastgpt.kernels.tiles import LinearTile, expert_tile, grouped_tile, route_tile, sum_tile

LEAST_KEY = tl.constexpr(-(2**63))
LAST_INDEX = tl.constexpr(2**31 - 1)
MOST_PRODUCTS = 1 << 28  # bytes of the products of many rows that are in memory at a time, unless one row has more


@triton.jit
def _keys(x, index):
    """Integers (64 bits) in the order of the numbers x (fp32), and of descending indices where these are equal; NaN is the
    largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    order = tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) + (LAST_INDEX - index)


@triton.jit
def _max(x):
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _tiles(n_features, BLOCK_N: tl.constexpr):
    """n_features / BLOCK_N rounded up, of at least 1 feature: tl.cdiv would add to the largest numbers of 32 bits."""
    return (n_features - 1) // BLOCK_N + 1


@kernel(do_not_specialize=["stride_lm", "scale"])
def route_kernel(
    logits_ptr, selection_bias_ptr, experts_ptr, weights_ptr,
    stride_lm, scale,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
    TOP2: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row of GROUPS · SIZE logits."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs_g, offs_s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    index = offs_g[:, None] * SIZE + offs_s[None, :]
    valid = (offs_g < GROUPS)[:, None] & (offs_s < SIZE)[None, :]
    x = tl.load(logits_ptr + row * tl.cast(stride_lm, tl.int64) + index, mask=valid, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        scores = tl.where(valid, tl.exp(x - _max(x)), 0.0)
        scores /= _sum(scores)
    choice = scores
    if selection_bias_ptr is not None:
        choice += tl.load(selection_bias_ptr + index, mask=valid, other=0.0)
    keys = tl.where(valid, _keys(choice, index), LEAST_KEY)
    if TOP_GROUPS < GROUPS:
        choice = tl.where(valid, choice, -float("inf"))
        best = tl.max(choice, 1)  # of each group
        if TOP2:
            is_best = keys == tl.max(keys, 1)[:, None]
            best += tl.max(tl.where(is_best, -float("inf"), choice), 1)
        of_groups = tl.where(offs_g < GROUPS, _keys(best, offs_g), LEAST_KEY)
        for _ in range(GROUPS - TOP_GROUPS):  # leaves out the worst
            worst = tl.min(tl.where(of_groups == LEAST_KEY, -(LEAST_KEY + 1), of_groups), 0)
            of_groups = tl.where(of_groups == worst, LEAST_KEY, of_groups)
        keys = tl.where((of_groups == LEAST_KEY)[:, None], LEAST_KEY, keys)
    offs_t = tl.arange(0, BLOCK_T)
    chosen = tl.zeros([BLOCK_T], tl.int32)
    weights = tl.zeros([BLOCK_T], tl.float32)
    for k in range(TOP_K):
        largest = _max(keys)
        is_largest = keys == largest
        chosen = tl.where(offs_t == k, LAST_INDEX - (largest & 0xFFFFFFFF).to(tl.int32), chosen)
        weights = tl.where(offs_t == k, _sum(tl.where(is_largest, scores, 0.0)), weights)
        keys = tl.where(is_largest, LEAST_KEY, keys)
    if NORMALIZE:
        weights /= tl.sum(weights, 0)
    tl.store(experts_ptr + row * TOP_K + offs_t, chosen, mask=offs_t < TOP_K)
    tl.store(weights_ptr + row * TOP_K + offs_t, weights * scale, mask=offs_t < TOP_K)


@triton.jit
def activate_gated(gate, up, ACTIVATION: tl.constexpr):
    """The gate's activation times up, or number 5, "swiglu_clamped" of fastgpt/ops/experts.py; propagates NaN."""
    if ACTIVATION == 5:
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return (up + 1.0) * (gate * tl.sigmoid(1.702 * gate))
    return activate(gate, ACTIVATION) * up


@triton.jit
def _load_columns(x_row, weights, up_weights, start, K: tl.constexpr, GATED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of x, the weight and, if gated, its second half, the columns from `start` on."""
    MASKED: tl.constexpr = K % BLOCK_K != 0
    offs_k = start + tl.arange(0, BLOCK_K)
    valid = offs_k < K
    w = masked_load(weights, offs_k[None, :], valid[None, :], MASKED)
    u = masked_load(up_weights, offs_k[None, :], valid[None, :], MASKED) if GATED else w
    return masked_load(x_row, offs_k, valid, MASKED), w, u


@kernel(do_not_specialize=["n_features", "n_experts", "stride_xm", "experts_ptr", "bias_ptr"])
def expert_up_kernel(
    x_ptr, experts_ptr, weight_ptr, bias_ptr, hidden_ptr,
    n_features, n_experts, stride_xm,
    TOP_K: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N features of h, here `hidden`, of a row of x and one of its TOP_K experts. The weight is (n_experts,
    n_features, K), or with a gate (n_experts, 2 n_features, K); hidden (rows, TOP_K, n_features) is fp32."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = _tiles(n_features, BLOCK_N)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.load(experts_ptr + pair).to(tl.int64)
    e = tl.where((e >= 0) & (e < n_experts), e, 0)
    features = tl.minimum(offs_n, n_features - 1)  # features past the last repeat it, and are not stored
    first = e * n_features * (2 if GATED else 1) + features
    weights = weight_ptr + first[:, None] * K
    up_weights = weight_ptr + (first[:, None] + n_features) * K
    x_row = x_ptr + pair // TOP_K * tl.cast(stride_xm, tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    x, w, u = _load_columns(x_row, weights, up_weights, 0, K, GATED, BLOCK_K)
    for start in range(BLOCK_K, K, BLOCK_K):
        next = _load_columns(x_row, weights, up_weights, start, K, GATED, BLOCK_K)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        if GATED:
            up_acc += u.to(tl.float32) * x.to(tl.float32)[None, :]
        x, w, u = next
    acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    if GATED:
        up_acc += u.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first).to(tl.float32)
    if GATED:
        up = tl.sum(up_acc, 1)
        if bias_ptr is not None:
            up += tl.load(bias_ptr + (first + n_features)).to(tl.float32)
        h = activate_gated(y, up, ACTIVATION)
    else:
        h = activate(y, ACTIVATION)
    tl.store(hidden_ptr + pair * n_features + offs_n, h, mask=offs_n < n_features)


@triton.jit
def _load_tile(
    hidden_rows, weight_ptr, features, n_features, experts, factors, step, K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The step-th tile of all columns of a row's experts: of hidden and of the weight, zeros if the expert is -1, and the expert's
    factor."""
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    offs_t, k = tl.arange(0, BLOCK_T), step // TILES
    e = tl.sum(tl.where(offs_t == k, experts, 0), 0)
    factor = tl.sum(tl.where(offs_t == k, factors, 0.0), 0)
    offs_k = step % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = offs_k < tl.where(e >= 0, K, 0)
    w = tl.load(weight_ptr + (e * n_features + features)[:, None] * K + offs_k[None, :], mask=valid[None, :], other=0.0)
    return tl.load(hidden_rows + k * K + offs_k, mask=valid, other=0.0), w, factor


@kernel(do_not_specialize=["n_features", "n_experts", "experts_ptr", "weights_ptr", "bias_ptr", "residual_ptr"])
def expert_down_kernel(
    hidden_ptr, experts_ptr, weights_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    n_features, n_experts,
    TOP_K: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of a row, of the products of all of its experts. hidden (rows, TOP_K, K) is fp32."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = _tiles(n_features, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_t = tl.arange(0, BLOCK_T)
    # All at once, so that no tile of weights waits for the index of its expert.
    experts = tl.load(experts_ptr + row * TOP_K + offs_t, mask=offs_t < TOP_K, other=-1).to(tl.int64)
    exists = (experts >= 0) & (experts < n_experts)
    factors = tl.where(exists, tl.load(weights_ptr + row * TOP_K + offs_t, mask=offs_t < TOP_K, other=0.0), 0.0)
    experts = tl.where(exists, experts, -1)
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    hidden_rows = hidden_ptr + row * (TOP_K * K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if TILES > 0:
        h, w, factor = _load_tile(hidden_rows, weight_ptr, features, n_features, experts, factors, 0, K, BLOCK_T, BLOCK_K)
        for step in range(1, TOP_K * TILES):
            next = _load_tile(hidden_rows, weight_ptr, features, n_features, experts, factors, step, K, BLOCK_T, BLOCK_K)
            acc += w.to(tl.float32) * (h * factor)[None, :]
            h, w, factor = next
        acc += w.to(tl.float32) * (h * factor)[None, :]
    if bias_ptr is not None:
        for k in range(TOP_K):
            e = tl.sum(tl.where(offs_t == k, experts, 0), 0)
            factor = tl.sum(tl.where(offs_t == k, factors, 0.0), 0)
            bias = tl.load(bias_ptr + e * n_features + features, mask=features < tl.where(e >= 0, n_features, 0), other=0.0)
            total += bias.to(tl.float32) * factor
    total += tl.sum(acc, 1)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * n_features + features).to(tl.float32)
    tl.store(out_ptr + row * n_features + offs_n, total.to(out_ptr.dtype.element_ty), mask=offs_n < n_features)


@triton.jit
def _rows_of_block(block, starts_ptr, block_ends_ptr, n_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of its rows) of a block of sorted rows; without rows if there are fewer blocks. block_ends: how
    many blocks the experts up to each have."""
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(block_ends_ptr + offs_e, mask=offs_e < n_experts, other=LAST_INDEX)
    e = tl.sum((ends <= block).to(tl.int32), 0).to(tl.int64)
    block = block.to(tl.int64) - tl.max(tl.where(ends <= block, ends, 0), 0)
    exists = e < n_experts
    start = tl.load(starts_ptr + e, mask=exists, other=0).to(tl.int64) + block * BLOCK_M
    return e, start, tl.load(starts_ptr + e + 1, mask=exists, other=0).to(tl.int64)


@kernel(do_not_specialize=["n_features", "n_experts", "stride_xm", "bias_ptr"])
def grouped_up_kernel(
    x_ptr, order_ptr, starts_ptr, block_ends_ptr, weight_ptr, bias_ptr, h_ptr,
    n_features, n_experts, stride_xm,
    TOP_K: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N features of h of BLOCK_M rows of an expert. Row i of h is that of the pair order[i] = row of x · TOP_K +
    k, and starts[e] is the first of expert e. X_UNIT divides stride_xm."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = _tiles(n_features, BLOCK_N)
    e, start, end = _rows_of_block(tl.program_id(0) // tiles, starts_ptr, block_ends_ptr, n_experts, BLOCK_E, BLOCK_M)
    if start >= end:
        return
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_m = start + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + tl.minimum(offs_m, end - 1))
    x_rows = (x_ptr + pairs // TOP_K * tl.multiple_of(tl.cast(stride_xm, tl.int64), X_UNIT))[:, None]
    first = e * n_features * (2 if GATED else 1) + features
    weights = weight_ptr + first[:, None] * K
    up_weights = weight_ptr + (first[:, None] + n_features) * K
    MASKED: tl.constexpr = K % BLOCK_K != 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        valid = offs_k[None, :] < K
        x = masked_load(x_rows, offs_k[None, :], valid, MASKED)
        w = masked_load(weights, offs_k[None, :], valid, MASKED)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        if GATED:
            u = masked_load(up_weights, offs_k[None, :], valid, MASKED)
            up_acc = tl.dot(x, u.T, up_acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first).to(tl.float32)[None, :]
    if GATED:
        if bias_ptr is not None:
            up_acc += tl.load(bias_ptr + (first + n_features)).to(tl.float32)[None, :]
        acc = activate_gated(acc, up_acc, ACTIVATION)
    else:
        acc = activate(acc, ACTIVATION)
    mask = (offs_m < end)[:, None] & (offs_n < n_features)[None, :]
    offsets = offs_m[:, None] * n_features + offs_n[None, :]
    tl.store(h_ptr + offsets, acc.to(h_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["n_features", "n_experts", "weights_ptr", "bias_ptr"])
def grouped_down_kernel(
    h_ptr, order_ptr, starts_ptr, block_ends_ptr, weights_ptr, weight_ptr, bias_ptr, products_ptr,
    n_features, n_experts,
    K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N features of the weighted products of BLOCK_M rows of an expert, in fp32, each stored where its pair is."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = _tiles(n_features, BLOCK_N)
    e, start, end = _rows_of_block(tl.program_id(0) // tiles, starts_ptr, block_ends_ptr, n_experts, BLOCK_E, BLOCK_M)
    if start >= end:
        return
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_m = start + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, end - 1)
    first = e * n_features + features
    h_rows, weights = h_ptr + rows[:, None] * K, weight_ptr + first[:, None] * K
    MASKED: tl.constexpr = K % BLOCK_K != 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        valid = offs_k[None, :] < K
        h = masked_load(h_rows, offs_k[None, :], valid, MASKED)
        w = masked_load(weights, offs_k[None, :], valid, MASKED)
        acc = tl.dot(h, w.T, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first).to(tl.float32)[None, :]
    pairs = tl.load(order_ptr + rows)
    acc *= tl.load(weights_ptr + pairs)[:, None]
    mask = (offs_m < end)[:, None] & (offs_n < n_features)[None, :]
    tl.store(products_ptr + pairs[:, None] * n_features + offs_n[None, :], acc, mask=mask)


@kernel(do_not_specialize=["n_features", "n_experts", "experts_ptr", "residual_ptr"])
def sum_experts_kernel(
    products_ptr, experts_ptr, residual_ptr, out_ptr,
    n_features, n_experts,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of a row, from the products of its experts that exist."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = _tiles(n_features, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = offs_n < n_features
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(TOP_K):
        e = tl.load(experts_ptr + row * TOP_K + k)
        product = tl.load(products_ptr + (row * TOP_K + k) * n_features + offs_n, mask=valid, other=0.0)
        total += tl.where((e >= 0) & (e < n_experts), product, 0.0)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * n_features + offs_n, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_features + offs_n, total.to(out_ptr.dtype.element_ty), mask=valid)


def route(
    logits: Tensor, top_k: int, sigmoid: bool = False, selection_bias: Tensor | None = None, num_groups: int = 1,
    top_groups: int = 1, top2: bool = False, normalize: bool = False, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel; no host sync. See `fastgpt.route`.

    Args:
        logits: (..., E) fp16|bf16|fp32; copied if the last dimension is not contiguous.

    Returns: (experts, weights): (..., top_k) int32 and fp32, contiguous.
    """
    shape = (*logits.shape[:-1], top_k)
    experts = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if experts.numel() == 0:
        return experts, weights
    E = logits.shape[-1]
    logits = rows_of(logits, E)
    bias = None if selection_bias is None else selection_bias.contiguous()
    pdl = has_dependent_launch(logits.device)
    constants = route_constants(E, top_k, num_groups, top_groups, sigmoid, top2, normalize, pdl)
    programs = grid("logits", len(logits))
    route_kernel.launch(programs, constants, logits, bias, experts, weights, logits.stride(0), float(scale))
    return experts, weights


def moe(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, residual: Tensor | None = None, activation: int = 3, gated: bool = True,
) -> Tensor:  # fmt: skip
    """Launches the kernels for few rows, or for many; no host sync. See `fastgpt.moe`.

    Args:
        x: (..., C) fp16|bf16|fp32; copied if the last dimension is not contiguous.
        up, down: (E, 2I or I, C) and (E, C, I), contiguous; in x's dtype, as biases and residual.
        activation: its number in ACTIVATION_NUMBERS of fastgpt/ops/experts.py.

    Returns: (..., C) in x's dtype, contiguous.
    """
    if INTERPRETED and x.dtype is torch.bfloat16:  # its tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        x, up, down, up_bias, down_bias, residual = (
            y if y is None else y.float() for y in (x, up, down, up_bias, down_bias, residual)
        )
        return moe(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated).bfloat16()
    out = x.new_empty(*x.shape)
    if out.numel() == 0:
        return out
    E, C, TOP_K = down.shape[0], x.shape[-1], experts.shape[-1]
    experts, weights = experts.reshape(-1, TOP_K).contiguous(), weights.reshape(-1, TOP_K).contiguous()
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    residual = None if residual is None else residual.reshape(-1, C).contiguous()
    x, target = rows_of(x, C), out.view(-1, C)
    few = len(x) == 1 or experts.numel() <= E
    run, step = (_few_rows, len(x)) if few else (_many_rows, max(1, MOST_PRODUCTS // (4 * C * TOP_K)))
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        of_part = x[part], experts[part], weights[part], None if residual is None else residual[part], target[part]
        run(*of_part, up, down, up_bias, down_bias, activation, gated)
    return out


def _few_rows(x, experts, weights, residual, out, up, down, up_bias, down_bias, activation, gated):
    (E, C, I), (rows, top_k), size = down.shape, experts.shape, x.element_size()
    h = torch.empty((rows, top_k, I), dtype=torch.float32, device=x.device)
    pdl = has_dependent_launch(x.device)
    if I:
        constants = up_constants(expert_tile(rows * top_k * up.shape[1], C, size), top_k, C, activation, gated, pdl)
        programs = grid("experts", rows * top_k, cdiv(I, constants["BLOCK_N"]))
        expert_up_kernel.launch(programs, constants, x, experts, up, up_bias, h, I, E, x.stride(0))
    constants = down_constants(expert_tile(rows * C, I, size), top_k, I, pdl)
    programs = grid("x", rows, cdiv(C, constants["BLOCK_N"]))
    expert_down_kernel.launch(programs, constants, h, experts, weights, down, down_bias, residual, out, C, E)


def _many_rows(x, experts, weights, residual, out, up, down, up_bias, down_bias, activation, gated):
    (E, C, I), (rows, top_k), pairs = down.shape, experts.shape, experts.numel()
    tile, pdl = grouped_tile(pairs, E, x.element_size()), has_dependent_launch(x.device)
    sorted_experts, order = experts.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_experts, torch.arange(E + 1, dtype=experts.dtype, device=x.device), out_int32=True)
    block_ends = ((starts.diff() + (tile.BLOCK_M - 1)) // tile.BLOCK_M).cumsum(0, dtype=torch.int32)
    blocks = pairs // tile.BLOCK_M + min(E, pairs)  # at most
    h = torch.empty((pairs, I), dtype=x.dtype, device=x.device)
    products = torch.empty((pairs, C), dtype=torch.float32, device=x.device)
    if I:
        unit = unit_of(x.stride(0), x.element_size())
        constants = grouped_up_constants(tile, E, top_k, C, activation, gated, unit, pdl)
        programs = grid("experts", blocks, cdiv(I, constants["BLOCK_N"]))
        rest = order, starts, block_ends, up, up_bias, h, I, E, x.stride(0)
        grouped_up_kernel.launch(programs, constants, x, *rest)
    constants = grouped_down_constants(tile, E, I, pdl)
    programs = grid("experts", blocks, cdiv(C, constants["BLOCK_N"]))
    grouped_down_kernel.launch(programs, constants, h, order, starts, block_ends, weights, down, down_bias, products, C, E)
    constants = sum_constants(C, top_k, pdl)
    programs = grid("x", rows, cdiv(C, constants["BLOCK_N"]))
    sum_experts_kernel.launch(programs, constants, products, experts, residual, out, C, E)


# The compile-time arguments and options of the kernels.

# Registers of a thread of few rows' kernels, of which those of long rows spill with 128: without a limit, ptxas spills some on 8.0
# for higher occupancy.
REGISTERS = 168


@functools.cache
def route_constants(
    E: int, top_k: int, num_groups: int, top_groups: int, sigmoid: bool, top2: bool, normalize: bool, pdl: bool
) -> Constants:
    constants = dict(GROUPS=num_groups, SIZE=E // num_groups, TOP_K=top_k, TOP_GROUPS=top_groups, SIGMOID=sigmoid, TOP2=top2)
    tile = route_tile(num_groups, E // num_groups)
    return Constants(
        **constants, NORMALIZE=normalize, BLOCK_T=triton.next_power_of_2(top_k), **tile, enable_fp_fusion=True,
        **dependent_launch(pdl),
    )  # fmt: skip


@functools.cache
def up_constants(tile: LinearTile, top_k: int, K: int, activation: int, gated: bool, pdl: bool) -> Constants:
    block_n = max(1, tile.BLOCK_N // 2) if gated else tile.BLOCK_N
    sizes = dict(BLOCK_N=block_n, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps, num_stages=tile.num_stages)
    of_call = dict(TOP_K=top_k, K=K, ACTIVATION=activation, GATED=gated)
    return Constants(**of_call, **sizes, maxnreg=REGISTERS, enable_fp_fusion=True, **dependent_launch(pdl))


@functools.cache
def down_constants(tile: LinearTile, top_k: int, K: int, pdl: bool) -> Constants:
    sizes = dict(BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps, num_stages=tile.num_stages)
    of_call = dict(TOP_K=top_k, K=K, BLOCK_T=triton.next_power_of_2(top_k))
    return Constants(**of_call, **sizes, maxnreg=REGISTERS, enable_fp_fusion=True, **dependent_launch(pdl))


@functools.cache
def grouped_up_constants(
    tile: LinearTile, E: int, top_k: int, K: int, activation: int, gated: bool, unit: int, pdl: bool
) -> Constants:
    sizes = tile._asdict() | ({"BLOCK_N": max(16, tile.BLOCK_N // 2)} if gated else {})
    of_call = dict(TOP_K=top_k, K=K, ACTIVATION=activation, GATED=gated, X_UNIT=unit, BLOCK_E=triton.next_power_of_2(E))
    return Constants(**of_call, **sizes, enable_fp_fusion=True, **dependent_launch(pdl))


@functools.cache
def grouped_down_constants(tile: LinearTile, E: int, K: int, pdl: bool) -> Constants:
    # Half of the features, as of a gated product: the addresses of rows that are stored apart take registers.
    sizes = dict(K=K, BLOCK_E=triton.next_power_of_2(E)) | tile._asdict() | {"BLOCK_N": max(16, tile.BLOCK_N // 2)}
    return Constants(**sizes, enable_fp_fusion=True, **dependent_launch(pdl))


@functools.cache
def sum_constants(C: int, top_k: int, pdl: bool) -> Constants:
    return Constants(TOP_K=top_k, **sum_tile(C), enable_fp_fusion=True, **dependent_launch(pdl))
