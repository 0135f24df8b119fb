"""No kernel loses an address: what it adds to a pointer has 64 bits wherever a tensor may have more than 2^31 elements, and
what a launch would count in too few bits is refused. Nothing is launched, and no GPU is needed."""

import math
import os

import pytest
import torch

triton = pytest.importorskip("triton")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from fake_gpu import launches, meta  # noqa: E402
from index_arithmetic import faults_of  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.machine_code import ir_of, source_of  # noqa: E402
from benchmarks.shipped_kernels import shipped  # noqa: E402
from fastgpt.kernels import attention_arguments  # noqa: E402
from fastgpt.kernels import attention_backward as backward  # noqa: E402
from fastgpt.kernels import attention_decode as decode  # noqa: E402
from fastgpt.kernels import attention_forward as forward  # noqa: E402
from fastgpt.kernels.decode_step import embed  # noqa: E402
from fastgpt.kernels.limits import MAX_COUNT  # noqa: E402
from fastgpt.kernels.linear import linear  # noqa: E402
from fastgpt.kernels.linear_quantized import linear_quantized  # noqa: E402
from fastgpt.kernels.norm import norm  # noqa: E402

MODULES = [
    "attention_forward",
    "attention_backward",
    "attention_decode",
    "kv_cache_update",
    "linear",
    "linear_quantized",
    "moe",
    "moe_quantized",
    "norm",
    "decode_step",
]
COUNTS = (
    "n_queries", "n_keys", "n_heads", "n_heads_kv", "n_tokens", "capacity", "group", "rows_of_head", "window", "page",
    "n_pages", "cu_q_ptr", "cu_k_ptr",
)  # fmt: skip


def limits_of(constants):
    """The most that launchers pass, see fastgpt/kernels/limits.py; what follows from it; and half of the widest head."""
    limits = dict.fromkeys(COUNTS, MAX_COUNT) | {"pairs": 128}
    for name, size in (("n_splits", "SPLIT"), ("m_tiles", "BLOCK_M"), ("n_tiles", "BLOCK_N")):
        if size in constants:
            limits[name] = math.ceil(MAX_COUNT / constants[size])
    return limits


def faults_in(function, dtype, cache_dtype, constants, given, arch):
    source, options = source_of(function, dtype, cache_dtype, constants, given)
    names = [name for i, name in enumerate(function.arg_names) if (i,) not in source.constants]
    return faults_of(ir_of(source, arch, options, "ttir"), names, limits_of(constants))


def distinct(module, dtypes, causal, head_dims):
    """Of the kernels that ship those that differ in more than sizes."""
    chosen = {}
    for configuration in shipped(90, [module]):
        function, dtype, cache_dtype, constants, given = configuration
        if dtype in dtypes and constants.get("IS_CAUSAL", True) in causal and constants.get("HEAD_DIM", 80) in head_dims:
            flags = [value for value in constants.values() if type(value) is bool]
            chosen.setdefault((function, dtype, cache_dtype, given, *flags), configuration)
    return list(chosen.values())


def assert_whole_addresses(configurations):
    assert configurations
    faults = {fault: x for x in configurations for fault in faults_in(*x, arch=90)}
    listed = [f"{x[0].fn.__name__} with {', '.join(x[4])}: {fault}" for fault, x in faults.items()]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(listed[:20])


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_addresses_are_computed_in_64_bits(module):
    """Of every kernel and set of arguments, by the TTIR, in which every product and sum on the way to an address is."""
    assert_whole_addresses(distinct(module, (torch.float16,), (True,), (80,)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("module", MODULES)
def test_addresses_of_more_kernels_are_computed_in_64_bits(module):
    assert_whole_addresses(distinct(module, (torch.float16, torch.float32), (True, False), (16, 80, 256)))


@triton.jit
def _planted(x_ptr, stride_m, stride_n, n_rows, n_keys, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    n_tiles = tl.cdiv(n_keys, BLOCK)
    tile = tl.program_id(0) % n_tiles
    if FAULT == "no fault":
        start = tl.cast(tile * BLOCK, tl.int64)
        ptrs = x_ptr + start * stride_m + rows * tl.cast(stride_n, tl.int64) + rows
    elif FAULT == "product with a stride":
        ptrs = x_ptr + tl.cast(tile, tl.int64) * BLOCK + rows * stride_n
    elif FAULT == "product with a stride, then extended":
        ptrs = x_ptr + (tile * stride_m).to(tl.int64) + rows
    elif FAULT == "product of counts":
        ptrs = x_ptr + (tile * n_rows).to(tl.int64) + rows
    elif FAULT == "product with a size":
        ptrs = x_ptr + (tile * BLOCK * 80).to(tl.int64) + rows
    elif FAULT == "32 bits for a token":
        ptrs = x_ptr + (tile * BLOCK + rows)
    elif FAULT == "programs without a limit":
        ptrs = x_ptr + (tl.program_id(0) * BLOCK + rows).to(tl.int64)
    elif FAULT == "shift":
        ptrs = x_ptr + (tile << 16).to(tl.int64) + rows
    elif FAULT == "a page of the table":
        ptrs = x_ptr + (tl.load(x_ptr).to(tl.int32) * BLOCK).to(tl.int64) + rows
    elif FAULT == "carried by a loop":
        offset = tl.cast(0, tl.int64)
        for i in range(n_keys):
            tl.store(x_ptr + offset, 1.0)
            offset = (i * stride_n).to(tl.int64)
        ptrs = x_ptr + rows
    elif FAULT == "chosen by a branch":
        offset = tl.cast(0, tl.int64)
        if n_rows > 5:
            offset = (tile * stride_n).to(tl.int64)
        else:
            tl.store(x_ptr, 2.0)
        ptrs = x_ptr + offset + rows
    tl.store(ptrs, 1.0)


FAULTS = [
    "product with a stride", "product with a stride, then extended", "product of counts", "product with a size",
    "32 bits for a token", "programs without a limit", "shift", "a page of the table", "carried by a loop",
    "chosen by a branch",
]  # fmt: skip


@pytest.mark.parametrize("fault", ["no fault", *FAULTS])
def test_a_planted_fault_is_found(fault):
    signature = {"x_ptr": "*fp32", "stride_m": "i32", "stride_n": "i32", "n_rows": "i32", "n_keys": "i32"}
    constants = {"FAULT": fault, "BLOCK": 64}
    source = ASTSource(_planted, signature | dict.fromkeys(constants, "constexpr"), constants)
    found = faults_of(ir_of(source, 90, {"enable_fp_fusion": True}, "ttir"), list(signature), {"n_keys": MAX_COUNT})
    assert bool(found) == (fault != "no fault"), found


def attend(q, k, **options):
    out, lse = forward.attention_forward(q, k, k, scale=0.1, **options)
    if options.get("block_table") is None:
        bias = options.get("bias")
        backward.attention_backward(
            out, lse, q, k, k, out, lse, scale=0.1, **options, needs_dbias=bias is not None and bias.numel() < 2**40
        )


def attend_one(q, k):
    decode.attention_decode(q, k, k, causal=True, scale=0.1)


def assert_wide_enough(launch):
    """Every integer has a type that holds it."""
    for name, kind in launch.signature.items():
        if kind in ("i32", "i64"):
            value, end = launch.arguments[name], 2 ** (int(kind[1:]) - 1)
            assert isinstance(value, int) and -end <= value < end, (name, kind, value)


@pytest.mark.parametrize("arch", (80, 90))
def test_larger_numbers_recompile(arch, monkeypatch):
    """The type of a number that is not specialized still follows from its value: none is cut off by a kernel that was compiled
    for smaller ones."""
    for module in (forward, backward, attention_arguments):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
    small, far = meta(2, 4, 40, 64), meta(2, 4, 40, 64, strides=(2**33, 2**32, 2**31, 1))
    near = meta(2, 4, 40, 64, strides=(2**31 - 8, 2**29, 64, 1))
    mask = meta(2, 4, 40, 40, dtype=torch.bool)
    far_mask = meta(2, 4, 40, 40, strides=(2**40, 2**36, 2**33, 2**31), dtype=torch.bool)
    far_rows = meta(80, 64, strides=(2**33, 1))
    bias, far_bias = (meta(*x.shape, strides=x.stride()) for x in (mask, far_mask))
    with launches(arch) as found:
        for q in small, near, far:
            attend(q, q)
            attend_one(q[:, :, :1], q)
        for m, b in ((mask, bias), (far_mask, far_bias)):
            attend(small, small, mask=m, bias=b)
        for rows in (small, far):
            norm(rows, meta(64))
            linear(rows[0, :, 0], meta(8, 64))
            linear_quantized(rows[0, :, 0], blocks(8, 64), 8, 32, False)
            linear_quantized(rows[:, :, :10].reshape(-1, 64) if rows is small else far_rows, blocks(8, 64), 8, 32, False)
            linear(meta(4, 64), meta(8, 64), residual=rows[0, :, 0, :8])
    variants = {}
    for launch in found:
        assert_wide_enough(launch)
        kinds = tuple(launch.signature.items())
        assert variants.setdefault((launch.kernel, launch.variant), kinds) == kinds
    for kernel in (
        "attention_forward_kernel",
        "backward_keys",
        "backward_queries",
        "attend_split_kernel",
        "norm_kernel",
        "several_rows_kernel",
        "quantized_several_rows_kernel",
        "quantized_many_rows_kernel",
    ):
        kinds = [dict(x) for (name, _), x in variants.items() if name == kernel]
        assert any("i64" in x.values() for x in kinds) and any("i64" not in x.values() for x in kinds), kernel


def blocks(n, columns):
    """Of 8 bits, in groups of 32."""
    return meta(n, columns // 32 * 34, dtype=torch.uint8)


def cu_seqlens(n):
    return meta(n + 1, dtype=torch.int32)


def packed(max_seqlen_q, max_seqlen_k):
    q = meta(1, 4, 100, 64)
    options = dict(scale=0.1, cu_seqlens_q=cu_seqlens(3), cu_seqlens_k=cu_seqlens(3), max_seqlen_q=max_seqlen_q)
    out, lse = forward.attention_forward(q, q, q, **options)
    backward.attention_backward(out, None, q, q, q, out, lse, **options, max_seqlen_k=max_seqlen_k)


def test_counts_are_clamped_or_refused_beyond_32_bits():
    """Counts that callers may choose freely are cut to what there is, and sizes that kernels cannot count are refused."""
    q = meta(2, 4, 40, 64)
    with launches() as found:
        for window in (1, 40, 2**31 - 1, 2**62):
            attend(q, q, window=window)
            decode.attention_decode(q[:, :, :1], q, q, causal=True, scale=0.1, window=window)
        packed(2**40, 2**50)
    for launch in found:
        limits = limits_of({name: value for name, value in launch.arguments.items() if name.isupper()})
        for name, value in launch.arguments.items():
            assert not isinstance(value, int) or value <= limits.get(name, 2**63), (launch.kernel, name, value)


@pytest.mark.parametrize("call", (
    lambda x: attend(x, meta(1, 1, 16, 16)),
    lambda x: attend_one(x, meta(1, 1, 16, 16)),
), ids=("prefill", "decode"))  # fmt: skip
@pytest.mark.parametrize("shape", ((1, 1, MAX_COUNT + 1, 16), (MAX_COUNT + 1, 1, 1, 16), (1, MAX_COUNT + 1, 1, 16)), ids=str)
def test_more_than_can_be_counted_is_refused(call, shape):
    with launches() as found, pytest.raises(ValueError, match="^q: expected no dimension above 2\\^28"):
        call(meta(*shape))
    assert not found


def test_more_pages_than_can_be_counted_are_refused():
    q, pool, table = meta(1, 1, 1, 64), meta(2**12, 1, 2**12, 64), meta(1, 2**17, dtype=torch.int32)
    for call in forward.attention_forward, decode.attention_decode:
        with launches() as found, pytest.raises(ValueError, match="^block_table: expected at most 2\\^28"):
            call(q, pool, pool, causal=True, scale=0.1, block_table=table)
        assert not found


@pytest.mark.parametrize("call, name", (
    (lambda: attend(meta(2**16, 2**15, 64, 16), meta(2**16, 2**15, 64, 16)), "q"),
    (lambda: attend_one(meta(2**16, 2**10, 1, 16), meta(2**16, 2**10, 2**14, 16)), "q"),
    (lambda: norm(meta(2**31, 1, 4096), meta(4096)), "x"),
    (lambda: embed(meta(2**31, dtype=torch.int64), meta(10, 64)), "ids"),
    (lambda: linear(meta(1, 16), meta(2**35, 16)), "weight"),
    (lambda: linear_quantized(meta(1000, 32), blocks(2**35, 32), 8, 32, False), "weight"),
), ids=("attention", "decode", "norm", "embed", "linear", "quantized"))  # fmt: skip
def test_more_programs_than_a_grid_holds_are_refused(call, name):
    with launches() as found, pytest.raises(ValueError, match=f"^{name}: expected work for at most 2\\^31 - 1 programs, got "):
        call()
    assert not found


SIZES = [(1, 8, 1, 1), (2, 4, 40, 40), (3, 2, 16, 77), (1, 16, 130, 130), (4, 1, 7, 33)]  # B, H, T, S


def calls(scale, offset):
    """One call of each kind, for sizes and strides that divide by 16 and do not, and are one; some tensors off their start."""
    for B, H, T, S in SIZES:
        q, k = meta(B, T, H, 64).transpose(1, 2), meta(B, H, S + offset, 64)[:, :, offset:]
        slopes, sinks = (meta(H + offset, dtype=torch.float32)[offset:] for _ in range(2))
        lengths = meta(B + offset, dtype=torch.int32)[offset:]
        bias, mask = (meta(B, H, T, S + offset, dtype=dtype)[..., offset:] for dtype in (torch.float16, torch.bool))
        dlse = meta(B * H * T + offset, dtype=torch.float32)[offset:].view(B, H, T)
        lse = meta(B * H * T + offset, dtype=torch.float32)[offset:].view(B, H, T)
        with_extras = dict(alibi_slopes=slopes, sinks=sinks, kv_lengths=lengths, bias=bias, mask=mask, window=T, softcap=scale)
        for options in {}, with_extras:
            out, _ = forward.attention_forward(q, k, k, scale=scale, **options)
            backward.attention_backward(out, dlse, q, k, k, out, lse, scale=scale, **options, needs_dbias="bias" in options)
        several = dict(alibi_slopes=slopes, sinks=sinks, kv_lengths=lengths, window=T, softcap=scale)
        for options in {}, several:
            decode.attention_decode(q[:, :, :1], k, k, causal=True, scale=scale, **options)
        norm(q, meta(64), eps=scale, offset=scale)
        linear(meta(1, 64), meta(T * 8, 64), bias=meta(T * 8 + offset)[offset:], norm_weight=meta(64), norm_offset=scale)
        linear(meta(4, 64), meta(T * 8, 64), bias=meta(T * 8 + offset)[offset:], norm_weight=meta(64), norm_offset=scale)
        for rows in (1, 4, 40):
            x, biases = meta(rows, 64), meta(T * 8 + offset)[offset:]
            linear_quantized(x, blocks(T * 8, 64), 8, 32, False, biases, norm_weight=meta(64), norm_offset=scale)
        embed(meta(B * T + offset, dtype=torch.int64)[offset:], meta(50 + T, 64), scale=scale)


@pytest.mark.slow
def test_kernels_are_compiled_once():
    """Whatever sizes, strides and numbers are, or where vectors begin. Only what is passed at all, and constants of the kernel,
    make variants."""
    with launches() as found:
        for scale in (0.25, 1.0, 1, 16, 3):
            for offset in (0, 1, 3):
                calls(scale, offset)
    variants: dict[tuple, set] = {}
    for launch in found:
        constants = tuple(sorted((name, str(kind)) for name, kind in launch.signature.items() if kind == "constexpr"))
        values = tuple((name, str(launch.arguments.get(name))) for name, _ in constants)
        variants.setdefault((launch.kernel, values), set()).add(launch.variant)
    assert {kernel for kernel, _ in variants} >= {
        "attention_forward_kernel", "delta_kernel", "backward_keys", "backward_queries", "backward_bias", "attend_split_kernel", "norm_kernel",
        "one_row_kernel", "several_rows_kernel", "embed_kernel", "quantized_one_row_kernel", "quantized_several_rows_kernel",
        "quantized_many_rows_kernel",
    }  # fmt: skip
    for (kernel, values), keys in variants.items():
        assert len(keys) == 1, f"{kernel} with {dict(values)}: variants\n" + "\n".join(sorted(keys)[:2])
