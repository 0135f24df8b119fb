"""The Triton attention kernel against the reference, and the machine code that ships, compiled without a GPU.

Tests that run the kernel need a GPU or Triton's interpreter. The interpreter is chosen when a kernel is decorated,
so it gets a process of its own: `test_under_the_interpreter` runs this file again with TRITON_INTERPRET=1.
"""

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

from fastgpt.kernels import attention_forward as kernel  # noqa: E402
from fastgpt.ops.attention import attention_reference  # noqa: E402

DEVICE = "cpu" if kernel.INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAN = float("nan")


def runs_kernel(test):
    return test if kernel.INTERPRETED else pytest.mark.gpu(test)


def random_inputs(B, H, H_kv, T, S, D, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D)


def lengths_of(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_parity(q, k, v, *, causal=True, scale=None, kv_lengths=None):
    """Runs the kernel on (q, k, v) and holds out and lse to the numerics contract. Returns both."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = dict(causal=causal, scale=scale, kv_lengths=kv_lengths, return_lse=True)
    out, lse = kernel.attention_forward(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths)
    oracle = attention_reference(q.double(), k.double(), v.double(), **options)
    low_precision = attention_reference(q, k, v, **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    for name, actual, expected, low in zip(("out", "lse"), (out, lse), oracle, low_precision, strict=True):
        check(actual, expected, low, dtype=actual.dtype, name=name)
    return out, lse


# B, H, H_kv, T, S, D, causal, kv_lengths
CASES = {
    "one query, one key": (1, 1, 1, 1, 1, 16, True, None),
    "decode": (2, 4, 1, 1, 77, 64, True, None),
    "decode, ragged": (3, 3, 1, 1, 50, 80, True, (0, 50, 17)),
    "few queries": (2, 3, 1, 5, 37, 40, True, None),
    "largest short tile": (1, 2, 2, 16, 64, 64, True, None),
    "smallest long tile": (1, 2, 2, 17, 64, 64, True, None),
    "whole blocks": (1, 1, 1, 128, 128, 64, True, None),
    "off-block": (1, 4, 1, 131, 131, 32, True, None),
    "S > T": (1, 2, 2, 70, 201, 128, True, None),
    "S < T": (1, 3, 3, 150, 67, 16, True, None),
    "S < T, short": (1, 1, 1, 9, 4, 32, True, None),
    "ragged": (4, 1, 1, 33, 150, 96, True, (0, 150, 64, 20)),
    "ragged, not causal": (3, 2, 2, 20, 90, 64, False, (0, 90, 65)),
    "not causal": (1, 1, 1, 140, 75, 256, False, None),
    "head dim 256": (1, 1, 1, 40, 70, 256, True, None),
    "head dim 1": (1, 1, 1, 20, 20, 1, True, None),
    "head dim 33": (1, 2, 1, 20, 30, 33, True, (25,)),
    "no keys": (2, 1, 1, 3, 0, 16, True, None),
    "no queries": (2, 1, 1, 0, 8, 16, True, None),
    "no batch": (0, 1, 1, 3, 8, 16, True, None),
}


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype):
    *shape, causal, values = case
    q, k, v = random_inputs(*shape, dtype)
    kv_lengths = lengths_of(values)
    if values is not None:  # NaN wherever nothing may be read
        for b, length in enumerate(values):
            k[b, :, length:] = v[b, :, length:] = NAN
    out, _ = assert_parity(q, k, v, causal=causal, kv_lengths=kv_lengths)
    assert out.transpose(1, 2).is_contiguous()


@runs_kernel
def test_queries_without_keys_give_zeros():
    q, k, v = random_inputs(1, 2, 1, 40, 30, 64, torch.float32)
    out, lse = kernel.attention_forward(q, k, v, scale=0.125)
    assert torch.equal(out[:, :, :10], torch.zeros_like(out[:, :, :10]))
    assert torch.equal(lse[:, :, :10], torch.full_like(lse[:, :, :10], -math.inf))
    assert lse[:, :, 10:].isfinite().all()


@runs_kernel
@pytest.mark.parametrize("causal", (True, False))
def test_lengths_are_clamped_to_the_capacity(causal):
    q, k, v = random_inputs(2, 1, 1, 3, 20, 16, torch.float32)
    k, v = k[:, :, :12], v[:, :, :12]
    beyond = kernel.attention_forward(q, k, v, causal=causal, scale=0.25, kv_lengths=lengths_of((19, -70)))
    clamped = kernel.attention_forward(q, k, v, causal=causal, scale=0.25, kv_lengths=lengths_of((12, 0)))
    for actual, expected in zip(beyond, clamped, strict=True):
        assert torch.equal(actual, expected)


def packed(x):  # (B, H, N, D) inside (B, N, 3, H, D), as one projection to q, k and v leaves it
    B, H, N, D = x.shape
    base = torch.full((B, N, 3, H, D), NAN, dtype=x.dtype, device=x.device)
    base[:, :, 1] = x.transpose(1, 2)
    return base[:, :, 1].transpose(1, 2)


def sequence_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


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
@pytest.mark.parametrize("head_dim", (33, 64))
@pytest.mark.parametrize("view", (packed, sequence_first, sliced, misaligned, expanded))
def test_parity_on_views(view, head_dim):
    q, k, v = random_inputs(2, 4, 2, 21, 35, head_dim, torch.float16)
    kv_lengths = lengths_of((35, 35, 20, 20))[::2]
    assert_parity(view(q), view(k), view(v), kv_lengths=kv_lengths)


@runs_kernel
@pytest.mark.parametrize("scale", (3.0, 1.0, 0.0, -0.5))
def test_parity_at_any_scale(scale):
    q, k, v = random_inputs(1, 2, 1, 30, 40, 64, torch.float32)
    assert_parity(q, k, v, scale=scale)


@runs_kernel
def test_large_scores_do_not_overflow():
    q, k, v = random_inputs(1, 1, 1, 40, 40, 64, torch.float32)
    q *= 1e4
    out, _ = assert_parity(q, k, v)
    assert out.isfinite().all()


LARGE_CASES = {
    "GPT-2": (4, 12, 12, 1024, 1024, 64, True, None),
    "Llama": (2, 32, 8, 1500, 1500, 128, True, None),
    "chunked prefill": (3, 8, 2, 300, 2500, 96, True, (300, 2500, 1111)),
    "decode": (8, 16, 4, 1, 4096, 128, True, (1, 4096, 17, 64, 65, 2000, 0, 4095)),
    "wide head": (1, 8, 1, 700, 900, 256, True, None),
    "not causal": (2, 4, 4, 333, 777, 80, False, None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_parity_at_size(case, dtype):
    *shape, causal, values = case
    q, k, v = random_inputs(*shape, dtype)
    assert_parity(q, k, v, causal=causal, kv_lengths=lengths_of(values))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    q, k, v = random_inputs(3, 2, 2, 40, 48, 64, torch.float16)
    pool = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    far_batch = pool.as_strided(k.shape, (2**30, 48 * 64, 64, 1)).copy_(k)  # batch 2 begins at element 2^31
    assert_parity(q, far_batch, v)
    far_row = pool.as_strided(k.shape, (64, 192, 3 * 2**24, 1)).copy_(k)  # row 43 begins past element 2^31
    assert_parity(q, far_row, v)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    q, k, v = random_inputs(2, 4, 2, 1, 100, 64, torch.float16)
    kv_lengths = lengths_of((100, 30))
    kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)
    kv_lengths.copy_(lengths_of((7, 90)))
    q.neg_()
    graph.replay()
    expected_out, expected_lse = kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


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
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_for(arch, dtype, constants, has_lengths):
    """The kernel as a launch compiles it: tensors start at multiples of 16 bytes, nothing else is specialised."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS}
    signature = {name: "i32" for name in kernel._attention_forward.arg_names}
    signature |= {name: POINTERS[dtype] for name in signature if name.endswith("_ptr")}
    signature |= {"lse_ptr": "*fp32", "kv_lengths_ptr": "*i32", "scale_log2": "fp32"}
    if not has_lengths:
        constants["kv_lengths_ptr"] = None
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name != "kv_lengths_ptr"
    }
    source = ASTSource(kernel._attention_forward, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def faults_in_machine_code(arch, dtype, constants, has_lengths):
    """What is wrong with one compiled kernel, as text; empty if nothing is."""
    compiled = compile_for(arch, dtype, constants, has_lengths)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))

    faults = []
    if stack or local:
        faults.append(f"spills {stack + local} bytes at {registers} registers")
    if shared > SHARED_MEMORY[arch]:
        faults.append(f"{shared} bytes of shared memory")
    if dtype.itemsize == 2 and arch == 90 and constants["BLOCK_M"] >= 64 and "wgmma.mma_async" not in ptx:
        faults.append("no wgmma")
    if "tf32" in ptx:
        faults.append("fp32 rounded to tf32")
    if "cp.async.cg" not in ptx or "cp.async.ca" in ptx:
        faults.append("copies narrower than 16 bytes")
    return f"sm_{arch} {dtype} {constants} has_lengths={has_lengths}: {', '.join(faults)}" if faults else ""


def assert_machine_code_is_sound(arch, configurations):
    jobs = [(arch, *configuration) for configuration in configurations]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        faults = [fault for fault in pool.map(faults_in_machine_code, *zip(*jobs, strict=True), chunksize=4) if fault]
    assert not faults, "\n".join(faults)


def is_demanding(dtype, constants, has_lengths):
    """Of each tile, the kernel under the most register pressure: every mask in play."""
    tail = constants["HEAD_DIM"] < constants["BLOCK_D"]
    return tail and constants["IS_CAUSAL"] and has_lengths and dtype is not torch.bfloat16


ahead_of_time = pytest.mark.skipif(kernel.INTERPRETED, reason="the interpreter does not compile")


@ahead_of_time
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_machine_code(arch):
    configurations = [configuration for configuration in kernel.aot_configurations() if is_demanding(*configuration)]
    assert len(configurations) == 2 * len(kernel.TILES)
    assert_machine_code_is_sound(arch, configurations)


@pytest.mark.slow
@ahead_of_time
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_machine_code_of_every_configuration(arch):
    assert_machine_code_is_sound(arch, list(kernel.aot_configurations()))
