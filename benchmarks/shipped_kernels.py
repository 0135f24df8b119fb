"""The kernels that ship, as configurations that tests and `python -m benchmarks.machine_code` compile without a GPU.

Of sizes that callers choose freely there are examples: of the head dims that share a tile two, one that fills it and one that
does not; of linear layers, norms and embeddings those of some models.
"""

import itertools
from collections.abc import Iterator

import torch

from fastgpt.kernels import (
    attention_backward,
    attention_decode,
    attention_forward,
    decode_step,
    kv_cache_update,
    linear,
    linear_quantized,
    moe,
    moe_quantized,
    norm,
    tiles,
)
from fastgpt.kernels.architecture import tiles_of
from fastgpt.kernels.dependent_launch import MIN_CAPABILITY


def shipped(capability: int, modules=None) -> Iterator[tuple]:
    """(kernel, dtype, the cache's dtype, constants and options, names of the optional arguments that are given) of all that
    ships for a compute capability times ten, or of some of SHIPPED."""
    for name in modules or SHIPPED:
        yield from SHIPPED[name](capability)


def has_pdl(capability: int) -> bool:
    """Whether kernels of a decode step are launched while the ones before them still run, with a driver that can."""
    return divmod(capability, 10) >= MIN_CAPABILITY


def head_dims(table: dict, element_size: int):
    """Yields (head dim of k, of v) of kernels: of each tile of a table those that fill it, and those that do not;
    of the widest, and of different ones, what models have."""
    for block, size in table:
        if size == element_size and block <= 256:
            yield from ((block, block), (block * 5 // 8, block * 5 // 8))
    yield from ((192, 128), (576, 512))


def units_of(given, dtype: torch.dtype) -> dict[str, int]:
    """The constants that are `unit_of` a mask and a bias, of those arguments that are given, with aligned rows."""
    sizes = {"MASK_UNIT": ("mask_ptr", 1), "BIAS_UNIT": ("bias_ptr", dtype.itemsize)}
    return {name: 16 // size if pointer in given else 0 for name, (pointer, size) in sizes.items()}


def _forward(capability: int) -> Iterator[tuple]:
    """Of the features, none; all that go together, as they ask for most; and each kind of storage."""
    features = [
        ((), {}),
        ((), {"has_window": True}),
        (("kv_lengths_ptr",), {"ragged": True}),
        (("kv_lengths_ptr",), {"ragged": True, "has_window": True}),
        (("sinks_ptr", "kv_lengths_ptr"), {"ragged": True, "has_window": True}),
        (("cu_q_ptr", "cu_k_ptr"), {"ragged": True}),
        (("cu_q_ptr", "cu_k_ptr"), {"ragged": True, "has_window": True}),
        (("alibi_ptr", "sinks_ptr", "bias_ptr", "seed_ptr"), {"has_window": True, "has_softcap": True, "with_extras": True}),
        (("mask_ptr", "bias_ptr", "sinks_ptr"), {"with_extras": True}),
        (("kv_lengths_ptr", "block_table_ptr"), {"with_extras": True, "has_window": True}),
        (("kv_lengths_ptr", "block_table_ptr", "k_scale_ptr", "v_scale_ptr"), {"with_extras": True}),
        (("cu_q_ptr", "cu_k_ptr", "seed_ptr"), {"with_extras": True}),
    ]
    arch = tiles_of(capability)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for (head_dim, v_dim), causal, (given, flags) in itertools.product(
            head_dims(tiles.ATTENTION["forward"], dtype.itemsize), (True, False), features
        ):
            cache_dtype = torch.int8 if "k_scale_ptr" in given else dtype
            units = units_of(given, dtype)
            constants = attention_forward.kernel_constants(head_dim, v_dim, dtype.itemsize, 80, causal, **flags) | units
            yield attention_forward.attention_forward_kernel, dtype, cache_dtype, constants, given
            bulk = arch >= 90 and dtype.itemsize == 2 and head_dim <= attention_forward.WIDEST_BULK
            if bulk and "block_table_ptr" not in given:
                constants = attention_forward.kernel_constants(head_dim, v_dim, dtype.itemsize, arch, causal, **flags) | units
                rest = ("q_rest_desc", "k_rest_desc") if constants["BLOCK_R"] else ()
                descriptors = "q_desc", "k_desc", "v_desc", *rest
                yield attention_forward.attention_forward_kernel, dtype, cache_dtype, constants, (*given, *descriptors)


def _backward(capability: int) -> Iterator[tuple]:
    """Likewise."""
    features = [
        ((), {}),
        (("dlse_ptr",), {}),
        (("kv_lengths_ptr",), {"has_window": True}),
        (("cu_q_ptr", "cu_k_ptr"), {}),
        (("cu_q_ptr", "cu_k_ptr"), {"has_window": True}),
        (
            ("kv_lengths_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr", "bias_ptr", "seed_ptr", "dlse_ptr"),
            {"has_window": True, "has_softcap": True},
        ),
        (("alibi_ptr", "bias_ptr", "seed_ptr"), {"has_softcap": True}),
        (("cu_q_ptr", "cu_k_ptr", "seed_ptr"), {}),
    ]
    arch = tiles_of(capability)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        dims = [x for x in head_dims(tiles.ATTENTION["keys"], dtype.itemsize) if max(x) <= attention_backward.WIDEST]
        for (head_dim, v_dim), causal, (given, flags) in itertools.product(dims, (True, False), features):
            if causal and given in ((), ("dlse_ptr",)):
                yield attention_backward.delta_kernel, dtype, dtype, attention_backward.delta_constants(v_dim), given
            if given == ("dlse_ptr",):
                continue
            with_extras = "with_extras " if "seed_ptr" in given else ""
            sizes = (head_dim, v_dim, dtype.itemsize, causal)
            for bulk in (False, True) if arch >= 90 and dtype.itemsize == 2 else (False,):
                table = tiles.keys_table(causal, bool(with_extras), "cu_q_ptr" in given)
                of_arch, units = arch if bulk else 80, units_of(given, dtype)
                of_keys = attention_backward.kernel_constants(table, of_arch, *sizes, **flags) | units
                descriptors = ("q_desc", "dout_desc") if bulk else ()
                yield attention_backward.backward_keys, dtype, dtype, of_keys, (*given, *descriptors)
                if bulk and (with_extras or max(head_dim, v_dim) > attention_backward.BULK_HEAD_DIM):
                    continue
                of_queries = attention_backward.kernel_constants(with_extras + "queries", of_arch, *sizes, **flags) | units
                descriptors = ("q_desc", "k_desc", "v_desc", "dout_desc") if bulk else ()
                yield attention_backward.backward_queries, dtype, dtype, of_queries, (*given, *descriptors)
                if "bias_ptr" in given:
                    for one_row, one_column in itertools.product((False, True), repeat=2):
                        shape = {"ONE_ROW": one_row, "ONE_COLUMN": one_column}
                        yield attention_backward.backward_bias, dtype, dtype, of_queries | shape, given


# What a call may bring along, by the kernel's argument that is None without it, and what tells that keys are split.
FEATURES = ("kv_lengths_ptr", "block_table_ptr", "alibi_ptr", "softcap", "window")
PARTS = ("acc_ptr", "softmax_ptr", "counters_ptr")
JOINING = ("kv_lengths_ptr", "new_k_ptr", "new_v_ptr", "slots_ptr")
POSITIONS = ("positions_ptr", "cos_ptr", "sin_ptr")


def _decode(capability: int) -> Iterator[tuple]:
    """Of each tile those without features, with all, and those in between that serving a model needs."""
    for dtype, few in itertools.product((torch.float16, torch.bfloat16, torch.float32), (False, True)):
        for head_dim, v_dim in head_dims(tiles.DECODE, dtype.itemsize):
            for cache_dtype, given in (
                (dtype, ()),
                (dtype, (*PARTS, "kv_lengths_ptr")),
                (dtype, (*PARTS, "kv_lengths_ptr", "block_table_ptr")),
                (dtype, (*PARTS, "mask_ptr", "bias_ptr")),
                (torch.int8, (*PARTS, "kv_lengths_ptr")),
                (torch.float8_e4m3fn, (*PARTS, "kv_lengths_ptr")),
                (torch.int8, (*PARTS, *FEATURES)),
                (torch.float8_e4m3fn, (*PARTS, *FEATURES, "sinks_ptr")),
                (dtype, (*PARTS, *JOINING)),
                (dtype, (*PARTS, *JOINING, *POSITIONS)),
                (dtype, (*PARTS, *JOINING, *POSITIONS, "block_table_ptr")),
                (torch.int8, (*PARTS, *JOINING, *POSITIONS)),
                (torch.float8_e4m3fn, (*PARTS, *JOINING, *POSITIONS)),
                (torch.int8, (*PARTS, *JOINING, *POSITIONS, *FEATURES)),
                (torch.float8_e4m3fn, (*PARTS, *JOINING, *POSITIONS, *FEATURES, "sinks_ptr")),
            ):
                flags = cache_dtype != dtype, few, "new_k_ptr" in given, "mask_ptr" in given
                variant = head_dim, v_dim, dtype.itemsize, tiles_of(capability), *flags
                split, units = tiles.decode_tile(*variant).SPLIT, units_of(given, dtype).values()
                constants = attention_decode.kernel_constants(variant, split, True, False, *units, has_pdl(capability))
                scales = () if cache_dtype == dtype else ("k_scale_ptr", "v_scale_ptr")
                yield attention_decode.attend_split_kernel, dtype, cache_dtype, constants, (*given, *scales)


NORM, RMS_NORM = ("norm_weight_ptr", "norm_bias_ptr"), ("norm_weight_ptr",)
PRODUCTS = (  # of GPT-2 124M, its XL, and Llamas of 1B and 8B: rows of the weight, columns, activation, gated, what is given
    (2304, 768, 0, False, (*NORM, "bias_ptr")),
    (768, 768, 0, False, ("bias_ptr", "residual_ptr")),
    (3072, 768, 1, False, (*NORM, "bias_ptr")),
    (50257, 768, 0, False, NORM),
    (768, 3072, 0, False, ("bias_ptr", "residual_ptr")),
    (6400, 1600, 1, False, (*NORM, "bias_ptr")),
    (1600, 6400, 0, False, ("bias_ptr", "residual_ptr")),
    (16384, 2048, 3, True, RMS_NORM),
    (2048, 8192, 0, False, ("residual_ptr",)),
    (6144, 4096, 0, False, RMS_NORM),
    (28672, 4096, 3, True, RMS_NORM),
    (4096, 14336, 0, False, ("residual_ptr",)),
    (128256, 4096, 0, False, RMS_NORM),
)  # fmt: skip


def _linear(capability: int) -> Iterator[tuple]:
    """Of the products of some models."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for dtype, product, rows in itertools.product(dtypes, PRODUCTS, (1, 8, 24, 32)):
        weight_rows, K, activation, gated, given = product
        tile = tiles.linear_tile(rows, weight_rows, K, dtype.itemsize, "norm_weight_ptr" in given)
        rms, unit = given[:2] != NORM, 16 // dtype.itemsize
        constants = linear.kernel_constants(tile, K, rms, activation, gated, unit, has_pdl(capability))
        yield linear.one_row_kernel if rows == 1 else linear.several_rows_kernel, dtype, dtype, constants, given


QUANTIZED = (  # of these products, and how the weight is stored: bits, group size (None: a row), minima
    (PRODUCTS[2], 4, 32, False),
    (PRODUCTS[3], 8, 32, False),
    (PRODUCTS[5], 4, 32, True),
    (PRODUCTS[10], 8, 128, True),
    (PRODUCTS[10], 4, 32, False),
    (PRODUCTS[11], 4, None, False),
)


def _linear_quantized(capability: int) -> Iterator[tuple]:
    """Likewise."""
    for dtype, rows, quantized in itertools.product((torch.float16, torch.bfloat16, torch.float32), (1, 8, 32, 512), QUANTIZED):
        (weight_rows, K, activation, gated, given), bits, group_size, minima = quantized
        many = rows > tiles.MOST_FEW_ROWS
        if many and dtype is torch.float32:
            continue
        tile, unit = tiles.quantized_tile(rows, weight_rows, K, bits, dtype.itemsize), 16 // dtype.itemsize
        weight, rms = (K, bits, group_size or K, minima), given[:2] != NORM
        constants = linear_quantized.kernel_constants(tile, *weight, rms, activation, gated, unit, many, has_pdl(capability))
        few = linear_quantized.quantized_one_row_kernel if rows == 1 else linear_quantized.quantized_several_rows_kernel
        kernel = linear_quantized.quantized_many_rows_kernel if many else few
        yield kernel, dtype, dtype, constants, tuple(name for name in given if name in kernel.arg_names)


# Of Mixtral 8x7B, Qwen3 30B-A3B, GPT-OSS 20B and DeepSeek-V3: experts, chosen, width, that of an expert, whether there are biases,
# and of its routing groups and those chosen, whether of sigmoids and by two experts each.
MIXTURES = (
    (8, 2, 4096, 14336, False, (1, 1, False, False)),
    (128, 8, 2048, 768, False, (1, 1, False, False)),
    (32, 4, 2880, 2880, True, (1, 1, False, False)),
    (256, 8, 7168, 2048, False, (8, 4, True, True)),
)


def _moe(capability: int) -> Iterator[tuple]:
    """Of one row, and of as many as fill the smallest tile and the largest."""
    pdl = has_pdl(capability)
    for dtype, mixture in itertools.product((torch.float16, torch.bfloat16, torch.float32), MIXTURES):
        E, K, C, I, biased, (groups, top_groups, sigmoid, top2) = mixture
        size, unit, activation, bias = dtype.itemsize, 16 // dtype.itemsize, 5 if biased else 3, ("bias_ptr",) * biased
        constants = moe.route_constants(E, K, groups, top_groups, sigmoid, top2, True, pdl)
        yield moe.route_kernel, dtype, dtype, constants, ("selection_bias_ptr",) * sigmoid
        tile = tiles.expert_tile(K * 2 * I, C, size)
        yield moe.expert_up_kernel, dtype, dtype, moe.up_constants(tile, K, C, activation, True, pdl), bias
        constants = moe.down_constants(tiles.expert_tile(C, I, size), K, I, pdl)
        yield moe.expert_down_kernel, dtype, dtype, constants, (*bias, "residual_ptr")
        for rows in (1, 50, 1000):  # of each expert
            tile = tiles.grouped_tile(rows * E, E, size)
            constants = moe.grouped_up_constants(tile, E, K, C, activation, True, unit, pdl)
            yield moe.grouped_up_kernel, dtype, dtype, constants, bias
            yield moe.grouped_down_kernel, dtype, dtype, moe.grouped_down_constants(tile, E, I, pdl), bias
        yield moe.sum_experts_kernel, dtype, dtype, moe.sum_constants(C, K, pdl), ("residual_ptr",)


def _moe_quantized(capability: int) -> Iterator[tuple]:
    """Of one row, and of several."""
    packings = (8, 32, False), (4, 32, False), (4, 64, True)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for dtype, mixture, weight, rows in itertools.product(dtypes, MIXTURES, packings, (1, 8)):
        E, K, C, I, biased, _ = mixture
        size, activation, bias = dtype.itemsize, 5 if biased else 3, ("bias_ptr",) * biased
        tile, pdl = tiles.quantized_tile(1, rows * K * 2 * I, C, weight[0], size), has_pdl(capability)
        constants = moe_quantized.up_constants(tile, K, C, *weight, activation, True, pdl)
        yield moe_quantized.quantized_expert_up_kernel, dtype, dtype, constants, bias
        constants = moe_quantized.down_constants(tiles.quantized_tile(1, rows * C, I, weight[0], 4), K, I, *weight, pdl)
        yield moe_quantized.quantized_expert_down_kernel, dtype, dtype, constants, (*bias, "residual_ptr")


def _norm(capability: int) -> Iterator[tuple]:
    """Of some models, few rows and many."""
    features = (True, ()), (False, ("norm_bias_ptr", "residual_ptr"))
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for C, dtype, (rms, given) in itertools.product((64, 128, 768, 4096), dtypes, features):
        for many in (False, True):
            constants = norm.kernel_constants(C, rms, many, has_pdl(capability))
            yield norm.norm_kernel, dtype, dtype, constants, ("norm_weight_ptr", *given)


STORED, ROTATED = ("new_k_ptr", "new_v_ptr", "slots_ptr"), ("new_q_ptr", "rotated_q_ptr", "positions_ptr", "cos_ptr", "sin_ptr")


def _update(capability: int) -> Iterator[tuple]:
    """Rows are aligned as most are, and of one model as little as any."""
    widest = tiles.WIDEST_ACCESS
    of_models = (  # head dims of k and v, pairs, interleaved, how rows are aligned
        (64, 64, 32, False, widest), (128, 128, 64, False, widest), (80, 80, 16, False, 1), (128, 128, 64, True, widest),
        (576, 512, 32, True, widest),
    )  # fmt: skip
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    choices = (False, True)
    for dtype, of_model, several, paged, rotates in itertools.product(dtypes, of_models, choices, choices, choices):
        head_dim, v_dim, pairs, interleaved, least = of_model
        for cache_dtype in (dtype, torch.int8, torch.float8_e4m3fn):
            aligned = (max(least, size) for size in (dtype.itemsize, cache_dtype.itemsize, 4))
            rotation = (pairs, interleaved) if rotates else (0, False)
            constants = kv_cache_update.kernel_constants(
                head_dim, v_dim, *rotation, several, dtype.itemsize, *aligned, has_pdl(capability)
            )
            given = (*STORED, *("block_table_ptr",) * paged, *ROTATED * rotates)
            scales = () if cache_dtype == dtype else ("k_scale_ptr", "v_scale_ptr")
            yield kv_cache_update.update_cache_kernel, dtype, cache_dtype, constants, (*given, *scales)


def _step(capability: int) -> Iterator[tuple]:
    """Embeddings of some models, and all that is done with tokens."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for dtype, C, given in itertools.product(dtypes, (768, 4096), ((), ("positions_ptr", "position_weight_ptr"))):
        yield decode_step.embed_kernel, dtype, dtype, decode_step.embed_constants(C, has_pdl(capability)), given
    dtype = torch.float32  # of what is not named
    constants = decode_step.one_warp_constants(tiles.ADVANCED, has_pdl(capability))
    yield decode_step.advance_kernel, dtype, dtype, constants, ("positions_ptr",)
    for block, given in itertools.product((32, 256), ((), ("ended_ptr", "eos_ptr"))):
        constants = decode_step.one_warp_constants(block, has_pdl(capability))
        yield decode_step.record_token_kernel, dtype, dtype, constants, given


SHIPPED = {  # of the modules of fastgpt.kernels
    "attention_forward": _forward, "attention_backward": _backward, "attention_decode": _decode, "linear": _linear,
    "linear_quantized": _linear_quantized, "moe": _moe,
    "moe_quantized": _moe_quantized, "norm": _norm, "kv_cache_update": _update, "decode_step": _step,
}  # fmt: skip
