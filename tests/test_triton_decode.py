"""The Triton kernel of attention over a long cache against the reference, and its machine code, compiled without a GPU.

As in test_triton_attention.py, tests that run the kernel need a GPU or Triton's interpreter, which gets a process of
its own.
"""

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import check
from packaging.version import Version

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastgpt.kernels import attention_decode as kernel  # noqa: E402
from fastgpt.ops.attention import attention_reference  # noqa: E402
from fastgpt.ops.quantisation import quantise  # noqa: E402

DEVICE = "cpu" if kernel.INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
NAN = float("nan")


def runs_kernel(test):
    return test if kernel.INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of 32 keys in steps of 16, so that small inputs have several."""
    tiles = {key: [tile._replace(BLOCK_N=16, SPLIT=32) for tile in pair] for key, pair in kernel.TILES.items()}
    monkeypatch.setattr(kernel, "TILES", tiles)
    kernel._constants.cache_clear()
    yield
    kernel._constants.cache_clear()


def random_inputs(B, H, H_kv, T, S, D, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def slopes_of(n_heads):
    return 0.5 ** torch.arange(1, n_heads + 1, dtype=torch.float32, device=DEVICE)


def sinks_of(n_heads, dtype=torch.float32):
    return torch.linspace(-2.0, 3.0, n_heads, device=DEVICE).to(dtype)


def poison(k, v, lengths):
    """NaN wherever nothing may be read."""
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = NAN


def assert_parity(q, k, v, *, causal=True, scale=None, **options):
    """Runs the kernel on (q, k, v) and holds out and lse to the numerics contract. Returns both."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = dict(causal=causal, scale=scale, **options)
    out, lse = kernel.attention_decode(q, k, v, **options)
    wide = (x if x.dtype in EIGHT_BITS else x.double() for x in (q, k, v))
    oracle = attention_reference(*wide, **options, return_lse=True)
    low_precision = attention_reference(q, k, v, **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    for name, actual, expected, low in zip(("out", "lse"), (out, lse), oracle, low_precision, strict=True):
        check(actual, expected, low, dtype=actual.dtype, name=name)
    return out, lse


def paged(x, page, order_seed=0):
    """(B, H_kv, S, ...) -> a pool of pages in random order, one more of NaN, and the table that finds them."""
    B, H_kv, S = x.shape[:3]
    pages = triton.cdiv(S, page)
    padded = x.new_zeros((B, H_kv, pages * page, *x.shape[3:]))
    padded[:, :, :S] = x
    places = torch.randperm(B * pages, generator=torch.Generator().manual_seed(order_seed)).to(DEVICE)
    pool = torch.full((B * pages + 1, H_kv, page, *x.shape[3:]), 0, dtype=x.dtype, device=DEVICE)
    pool[-1] = NAN if x.is_floating_point() else 0
    pool[places] = padded.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)
    return pool, places.view(B, pages).int()


# B, H, H_kv, T, S, D, lengths; with splits of 32 keys
CASES = {
    "one query, one key": (1, 1, 1, 1, 1, 16, None),
    "one split": (2, 4, 1, 1, 30, 64, None),
    "several splits": (2, 3, 1, 1, 100, 80, None),
    "whole splits": (1, 4, 4, 1, 64, 40, None),
    "ragged": (5, 3, 1, 1, 97, 40, (0, 97, 1, 32, 33)),
    "three queries": (2, 4, 1, 3, 70, 64, (70, 41)),
    "more rows than the short tile": (2, 8, 2, 5, 40, 16, (2, 40)),
    "two tiles of rows": (1, 14, 1, 5, 40, 16, None),
    "more queries than keys": (1, 1, 1, 5, 3, 128, None),
    "more queries than length": (3, 3, 3, 5, 50, 16, (3, 4, 50)),
    "head dim 128": (1, 4, 1, 1, 70, 128, None),
    "head dim 256": (1, 3, 1, 1, 70, 256, (65,)),
    "head dim 1": (1, 1, 1, 1, 20, 1, None),
    "many splits": (1, 1, 1, 1, 550, 16, None),
    "no keys": (2, 1, 1, 3, 0, 16, None),
    "no queries": (2, 1, 1, 0, 8, 16, None),
    "no batch": (0, 1, 1, 1, 8, 16, None),
}


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, short_splits):
    *shape, lengths = case
    q, k, v = random_inputs(*shape, dtype)
    if lengths is not None:
        poison(k, v, lengths)
    assert_parity(q, k, v, kv_lengths=None if lengths is None else ints(lengths))


@runs_kernel
@pytest.mark.parametrize("D", (64, 128))
def test_parity_of_the_tiles_that_ship(D):
    q, k, v = random_inputs(2, 4, 2, 2, 300, D, torch.float16)
    assert_parity(q, k, v, kv_lengths=ints((300, 70)))


# Tensors are functions of the number of heads.
FEATURES = {
    "not causal": dict(causal=False),
    "window 1": dict(window=1),
    "window": dict(window=37),
    "window beyond all keys": dict(window=2**40),
    "window, not causal": dict(window=20, causal=False),
    "softcap": dict(softcap=2.0),
    "alibi": dict(alibi_slopes=slopes_of),
    "sinks": dict(sinks=sinks_of),
    "all": dict(window=50, softcap=3.0, alibi_slopes=slopes_of, sinks=functools.partial(sinks_of, dtype=torch.float16)),
}


@runs_kernel
@pytest.mark.parametrize(("dtype", "S"), ((torch.float16, 25), (torch.float32, 90)), ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_parity_of_features(dtype, options, S, short_splits):
    options = {name: value(6) if callable(value) else value for name, value in options.items()}
    q, k, v = random_inputs(3, 6, 2, 3, S, 40, dtype)
    lengths = (S, 2, S // 2)  # of the second sequence, the first query sees nothing
    poison(k, v, lengths)
    out, lse = assert_parity(3.0 * q, k, v, kv_lengths=ints(lengths), **options)
    if options.get("causal", True):
        assert not out[1, :, 0].any() and (lse[1, :, 0] == -math.inf).all()


@runs_kernel
@pytest.mark.parametrize("scale", (3.0, 0.0, -0.5))
@pytest.mark.parametrize("softcap", (None, 1.5))
def test_parity_at_any_scale(scale, softcap, short_splits):
    q, k, v = random_inputs(1, 2, 1, 2, 40, 64, torch.float32)
    assert_parity(q, k, v, scale=scale, softcap=softcap)


@runs_kernel
def test_large_scores_do_not_overflow(short_splits):
    q, k, v = random_inputs(1, 2, 1, 2, 70, 64, torch.float32)
    out, _ = assert_parity(1e4 * q, k, v, sinks=sinks_of(2))
    assert out.isfinite().all()


@runs_kernel
@pytest.mark.parametrize("page", (1, 16, 33))
@pytest.mark.parametrize("window", (None, 40))
def test_parity_on_pages(page, window, short_splits):
    q, k, v = random_inputs(3, 4, 2, 3, 99, 64, torch.float16)
    lengths = (99, 50, 0)
    poison(k, v, lengths)
    (k, block_table), (v, _) = paged(k, page), paged(v, page)
    expected = assert_parity(q, k, v, block_table=block_table, kv_lengths=ints(lengths), window=window)
    for b, length in enumerate(lengths):  # pages that hold no key may be any, without and with contents
        first = 0 if window is None else max(0, length - 3 - window + 1) // page
        used = torch.zeros(block_table.shape[1], dtype=torch.bool, device=DEVICE)
        used[first : triton.cdiv(length, page)] = True
        garbage = ints([2**31 - 1, -(2**31), -1, k.shape[0] - 1]).repeat(triton.cdiv(len(used), 4))[: len(used)]
        block_table[b] = torch.where(used, block_table[b], garbage)
    actual = kernel.attention_decode(
        q, k, v, causal=True, scale=0.125, block_table=block_table, kv_lengths=ints(lengths), window=window
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@runs_kernel
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", (40, 128))
def test_parity_on_8_bits(dtype, cache_dtype, D, short_splits):
    q, k, v = random_inputs(2, 6, 2, 1, 70, D, dtype)
    k, k_scale = quantise(k, cache_dtype)
    v, v_scale = quantise(v, cache_dtype)
    lengths = (70, 33)
    poison(k_scale, v_scale, lengths)
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale, kv_lengths=ints(lengths))


@runs_kernel
@pytest.mark.parametrize("magnitude", (1e-4, 6e4))
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_8_bits_of_any_magnitude(cache_dtype, magnitude, short_splits):
    """v_scale times a weight is a number that fp16 may not have."""
    q, k, v = random_inputs(1, 4, 1, 1, 70, 64, torch.float16)
    k, k_scale = quantise(k, cache_dtype)
    v, v_scale = quantise((v.float() / v.float().abs().max() * magnitude), cache_dtype)
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale)


@runs_kernel
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_parity_of_everything(cache_dtype, short_splits):
    q, k, v = random_inputs(3, 6, 2, 3, 99, 80, torch.float16)
    k, k_scale = quantise(k, cache_dtype)
    v, v_scale = quantise(v, cache_dtype)
    lengths = (99, 50, 2)
    poison(k_scale, v_scale, lengths)
    pools = [paged(x.view(torch.int8) if x.dtype in EIGHT_BITS else x, 16) for x in (k, v, k_scale, v_scale)]
    (k, block_table), (v, _), (k_scale, _), (v_scale, _) = pools
    assert_parity(
        q, k.view(cache_dtype), v.view(cache_dtype), k_scale=k_scale, v_scale=v_scale, block_table=block_table,
        kv_lengths=ints(lengths), window=60, softcap=3.0, alibi_slopes=slopes_of(6), sinks=sinks_of(6),
    )  # fmt: skip


@runs_kernel
def test_lengths_are_clamped_to_the_capacity(short_splits):
    q, k, v = random_inputs(2, 1, 1, 3, 60, 16, torch.float32)
    k, v = k[:, :, :50], v[:, :, :50]
    beyond = kernel.attention_decode(q, k, v, causal=True, scale=0.25, kv_lengths=ints((59, -70)))
    clamped = kernel.attention_decode(q, k, v, causal=True, scale=0.25, kv_lengths=ints((50, 0)))
    for actual, expected in zip(beyond, clamped, strict=True):
        assert torch.equal(actual, expected)


@runs_kernel
@pytest.mark.parametrize("window", (None, 45))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_neither_batch_nor_capacity_changes_a_bit(dtype, window, short_splits):
    q, k, v = random_inputs(3, 4, 2, 2, 99, 64, dtype)
    lengths = (99, 20, 70)
    options = dict(causal=True, scale=0.125, window=window, sinks=sinks_of(4))
    together = kernel.attention_decode(q, k, v, kv_lengths=ints(lengths), **options)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        for capacity in {length, 99}:
            alone = kernel.attention_decode(
                q[one], k[one, :, :capacity], v[one, :, :capacity], kv_lengths=ints((length,)), **options
            )
            for a, t in zip(alone, together, strict=True):
                assert torch.equal(a, t[one])


@runs_kernel
def test_pages_and_plain_caches_agree_to_the_bit(short_splits):
    q, k, v = random_inputs(2, 4, 2, 1, 96, 64, torch.float16)
    plain = kernel.attention_decode(q, k, v, causal=True, scale=0.125)
    (k, block_table), (v, _) = paged(k, 16), paged(v, 16)
    on_pages = kernel.attention_decode(q, k, v, causal=True, scale=0.125, block_table=block_table)
    for actual, expected in zip(on_pages, plain, strict=True):
        assert torch.equal(actual, expected)


def packed(x):  # (B, H, N, D) inside (B, N, 3, H, D), as one projection to q, k and v leaves it
    B, H, N, D = x.shape
    base = torch.full((B, N, 3, H, D), NAN, dtype=x.dtype, device=x.device)
    base[:, :, 1] = x.transpose(1, 2)
    return base[:, :, 1].transpose(1, 2)


def sliced(x):  # out of a larger cache, on aligned addresses
    B, H, N, D = x.shape
    base = torch.full((B + 1, H + 1, N + 7, D + 8), NAN, dtype=x.dtype, device=x.device)
    view = base[1:, 1:, 3 : 3 + N, :D]
    return view.copy_(x)


def misaligned(x):  # rows start between two multiples of 16 bytes
    B, H, N, D = x.shape
    base = torch.full((B, H, N, D + 3), NAN, dtype=x.dtype, device=x.device)
    view = base[..., 1 : 1 + D]
    return view.copy_(x)


def expanded(x):
    return x[:1].expand(x.shape)


@runs_kernel
@pytest.mark.parametrize("D", (33, 64))
@pytest.mark.parametrize("view", (packed, sliced, misaligned, expanded))
def test_parity_on_views(view, D, short_splits):
    q, k, v = random_inputs(2, 4, 2, 2, 40, D, torch.float16)
    kv_lengths = ints((40, 40, 20, 20))[::2]
    slopes, sinks = slopes_of(8)[::2], sinks_of(8)[::2]
    assert_parity(view(q), view(k), view(v), kv_lengths=kv_lengths, alibi_slopes=slopes, sinks=sinks)


@runs_kernel
def test_scales_on_views(short_splits):
    q, k, v = random_inputs(2, 4, 2, 1, 40, 64, torch.float16)
    k, k_scale = quantise(k, torch.int8)
    v, v_scale = quantise(v, torch.int8)
    k_scale, v_scale = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (k_scale, v_scale))
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale)


LARGE_CASES = {
    "Llama": (8, 32, 8, 1, 4096, 128, (1, 4096, 17, 64, 65, 2000, 0, 4095)),
    "speculative": (2, 32, 8, 5, 3000, 128, (3000, 1234)),
    "long": (1, 8, 2, 1, 70_000, 64, None),
    "wide head": (2, 8, 1, 1, 2000, 256, (2000, 900)),
    "off-block": (3, 6, 2, 2, 1111, 80, (1111, 0, 600)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", (None, *EIGHT_BITS), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_parity_at_size(case, dtype, cache_dtype):
    *shape, lengths = case
    q, k, v = random_inputs(*shape, dtype)
    options = dict(kv_lengths=None if lengths is None else ints(lengths))
    if cache_dtype is not None:
        k, options["k_scale"] = quantise(k, cache_dtype)
        v, options["v_scale"] = quantise(v, cache_dtype)
    assert_parity(q, k, v, **options)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    q, k, v = random_inputs(3, 2, 2, 1, 48, 64, torch.float16)
    pool = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    far_batch = pool.as_strided(k.shape, (2**30, 48 * 64, 64, 1)).copy_(k)  # batch 2 begins at element 2^31
    assert_parity(q, far_batch, v)
    assert_parity(q, far_batch, v, block_table=ints((2, 0, 1)).view(3, 1))
    far_row = pool.as_strided(k.shape, (64, 192, 3 * 2**24, 1)).copy_(k)  # row 43 begins past element 2^31
    assert_parity(q, far_row, v)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    q, k, v = random_inputs(2, 4, 2, 1, 1000, 64, torch.float16)
    kv_lengths = ints((1000, 30))
    decode = functools.partial(kernel.attention_decode, q, k, v, causal=True, scale=0.125, kv_lengths=kv_lengths)
    decode()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode()
    kv_lengths.copy_(ints((7, 900)))
    q.neg_()
    graph.replay()
    expected_out, expected_lse = decode()
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


@pytest.mark.slow
@pytest.mark.skipif(kernel.INTERPRETED, reason="is itself under the interpreter")
@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 needs NumPy < 2.4: it turns one-element arrays into loop bounds",
)
def test_under_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-k", "not machine_code", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and int(re.search(r"(\d+) passed", run.stdout)[1]) >= len(CASES), run.stdout[-4000:]


# Shared memory a block may use, in bytes. Chips of compute capability 8.6 and 8.9 run the code of 8.0 in 99 KiB.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8",
    torch.float8_e4m3fn: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
OPTIONAL = {
    "acc_ptr": "*fp32", "softmax_ptr": "*fp32", "kv_lengths_ptr": "*i32", "block_table_ptr": "*i32",
    "alibi_slopes_ptr": "*fp32", "sinks_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
    "softcap": "fp32", "window": "i32",
}  # fmt: skip
UNALIGNED = {"kv_lengths_ptr", "block_table_ptr", "alibi_slopes_ptr", "sinks_ptr", "k_scale_ptr", "v_scale_ptr"}


def compile_for(arch, fn, types, given, constants):
    """A kernel as a launch compiles it: tensors start at multiples of 16 bytes, nothing else is specialised."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    constants |= {name: None for name in OPTIONAL if name in fn.arg_names and name not in given}
    signature = {name: OPTIONAL.get(name, "i32") for name in fn.arg_names} | types
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name not in UNALIGNED
    }
    source = ASTSource(fn, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_split(arch, dtype, cache_dtype, given, constants):
    types = {"lse_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("q_ptr", "out_ptr"), POINTERS[dtype])
    types |= dict.fromkeys(("k_ptr", "v_ptr"), POINTERS[cache_dtype])
    scales = () if cache_dtype == dtype else ("k_scale_ptr", "v_scale_ptr")
    return compile_for(arch, kernel._attend_split, types, (*given, *scales), constants)


def compile_combine(arch, dtype, head_dim, given):
    types = {"out_ptr": POINTERS[dtype], "lse_ptr": "*fp32"}
    constants = kernel._combine_constants(head_dim, 256)
    return compile_for(arch, kernel._combine, types, (*given, "acc_ptr", "softmax_ptr"), constants)


def usage_of(compiled):
    """Registers a thread, and bytes of memory that a thread uses besides: spills."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def faults_in_machine_code(arch, dtype, cache_dtype, given, constants):
    """What is wrong with one compiled kernel, as text; empty if nothing is."""
    compiled = compile_split(arch, dtype, cache_dtype, given, constants)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = usage_of(compiled)
    faults = []
    if spilled:
        faults.append(f"spills {spilled} bytes at {registers} registers")
    if shared > SHARED_MEMORY[arch]:
        faults.append(f"{shared} bytes of shared memory")
    if "tf32" in ptx:
        faults.append("fp32 rounded to tf32")
    if constants["num_stages"] > 1 and "cp.async.cg" not in ptx and cache_dtype == dtype:
        faults.append("keys are not copied 16 bytes at a time")
    if "block_table_ptr" not in given and cache_dtype == dtype and "cp.async.ca" in ptx:
        faults.append("copies narrower than 16 bytes")
    names = (f"sm_{arch}", str(dtype), str(cache_dtype), *given, str(constants))
    return f"{' '.join(names)}: {', '.join(faults)}" if faults else ""


def assert_machine_code_is_sound(arch, configurations):
    jobs = [(arch, *configuration) for configuration in configurations]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        faults = [fault for fault in pool.map(faults_in_machine_code, *zip(*jobs, strict=True), chunksize=4) if fault]
    assert not faults, "\n".join(faults)


def is_demanding(dtype, cache_dtype, given, constants):
    """Of each tile, the kernel under the most register pressure: every feature, every mask, and e4m3 to decode."""
    tail = constants["HEAD_DIM"] < constants["BLOCK_D"]
    return tail and "sinks_ptr" in given and dtype is not torch.bfloat16


ahead_of_time = pytest.mark.skipif(kernel.INTERPRETED, reason="the interpreter does not compile")


@pytest.mark.slow
@ahead_of_time
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_machine_code(arch):
    configurations = [configuration for configuration in kernel.aot_configurations() if is_demanding(*configuration)]
    assert len(configurations) == 2 * len(kernel.TILES)
    assert_machine_code_is_sound(arch, configurations)


@pytest.mark.slow
@ahead_of_time
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_machine_code_of_combine(arch):
    for head_dim, dtype, given in (
        (16, torch.float16, ()),
        (80, torch.bfloat16, ("kv_lengths_ptr", "sinks_ptr")),
        (256, torch.float32, ("kv_lengths_ptr", "sinks_ptr", "window")),
    ):
        registers, spilled = usage_of(compile_combine(arch, dtype, head_dim, given))
        assert spilled == 0, f"head dim {head_dim} spills {spilled} bytes at {registers} registers"


@pytest.mark.skipif("FASTGPT_TEST_ALL_MACHINE_CODE" not in os.environ, reason="takes an hour on two cores")
@ahead_of_time
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_machine_code_of_every_configuration(arch):
    assert_machine_code_is_sound(arch, list(kernel.aot_configurations()))
