"""Programmatic dependent launch: every kernel of a decode step waits for the one before ahead of all that it reads and writes.

Shown in the PTX of what ships. No GPU is needed.
"""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from fake_gpu import launches, meta, names_of_launched  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks import shipped_kernels  # noqa: E402
from benchmarks.machine_code import ir_of, source_of  # noqa: E402
from fastgpt.kernels import (  # noqa: E402
    attention_decode,
    decode_step,
    kv_cache_update,
    linear,
    linear_quantized,
    moe,
    moe_quantized,
    norm,
    tiles,
)
from fastgpt.kernels.dependent_launch import (  # noqa: E402
    dependent_launch,
    has_dependent_launch,
    launch_dependents,
    prefetch_to_l2,
    wait_for_dependencies,
)

MODULES = (
    attention_decode,
    kv_cache_update,
    linear,
    linear_quantized,
    moe,
    moe_quantized,
    norm,
    decode_step,
)  # of what a step launches
ACCESS = re.compile(r"\b(?:ld|st|atom|red|multimem|ldu)\.(?!param|shared|const)[\w.:]+|\bcp\.async\S*|\b(?:w?mma|wgmma)\S*")
CONTROL = re.compile(r"^\s*(?:@\S+\s+)?(?:bra|ret|exit|brx\.idx|call|trap)\b|^\$L__BB\w+:", re.MULTILINE)
AHEAD = "cp.async.bulk.prefetch.L2.global"  # which has no effect but on time


def faults_in(ptx: str) -> list[str]:
    """Where a program may read, write or end before it waits; empty if it does not."""
    body = ptx[ptx.index(".entry") :]
    if "griddepcontrol.wait" not in body:
        return ["it does not wait"]
    before = body[: body.index("griddepcontrol.wait")]
    faults = [f"{access} before the wait" for access in ACCESS.findall(before) if access != AHEAD]
    if match := CONTROL.search(before):
        faults.append(f"{match[0].strip()} before the wait, which some programs may not come to")
    if before.count("griddepcontrol.launch_dependents") != 1:
        faults.append("the next kernel is not let start")
    if "tcgen05.alloc" in body[body.find("griddepcontrol.launch_dependents") :]:
        faults.append("programs of the next kernel may hold the tensor memory that this one needs")
    return faults


def ptx_of(configuration, arch):
    source, options = source_of(*configuration)
    return ir_of(source, arch, options, "ptx")


def shipped(arch):
    return list(shipped_kernels.shipped(arch, [module.__name__.rpartition(".")[2] for module in MODULES]))


def distinct(arch, thorough=False):
    """Of each kernel one; thorough: one of each set of arguments and flags."""
    chosen = {}
    for x in shipped(arch):
        function, dtype, cache_dtype, constants, given = x
        flags = [value for value in constants.values() if type(value) is bool]
        tells = [name in given for name in ("acc_ptr", "new_k_ptr", "cos_ptr")]
        kind = (cache_dtype, given, *flags) if thorough else (constants.get("GATED"), *tells)
        chosen.setdefault((function.__name__, dtype.itemsize == 2, *kind), x)
    return [
        x
        for x in chosen.values()
        if thorough or x[1].itemsize == 2 or x[0].__name__ in ("advance_kernel", "record_token_kernel")
    ]


def name_of(x):
    return f"{x[0].__name__} {x[3]} {x[4]}"


def test_every_kernel_of_a_decode_step_is_checked():
    names = set().union(*map(names_of_launched, MODULES))
    assert names == {x[0].__name__ for x in distinct(90)} and len(names) == 19
    for arch, has_it in ((80, False), (89, False), (90, True), (100, True), (120, True)):
        for x in shipped(arch):
            assert (x[3]["PDL"], x[3].get("launch_pdl", False)) == (has_it, has_it), name_of(x)


def small(arch):
    return [
        x for x in distinct(arch) if x[0].__name__ in ("advance_kernel", "record_token_kernel", "embed_kernel", "norm_kernel")
    ]


@pytest.mark.parametrize("arch", (90, 120))
def test_kernels_wait_before_they_read_or_write(arch):
    for x in small(arch):
        assert not faults_in(ptx_of(x, arch)), name_of(x)


@pytest.mark.slow
@pytest.mark.parametrize("arch", (90, pytest.param(100, marks=pytest.mark.exhaustive)))
def test_all_kernels_of_a_step_wait_before_they_read_or_write(arch):
    chosen = distinct(arch)
    assert len(chosen) >= 14
    for x in chosen:
        ptx = ptx_of(x, arch)
        assert not faults_in(ptx), name_of(x)
        weights = x[3].get("GATED", 0) + 1 if x[0].__name__.endswith(("one_row_kernel", "several_rows_kernel")) else 0
        assert ptx.count(AHEAD) == weights


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", (90, 100))
def test_kernels_with_any_arguments_wait_before_they_read_or_write(arch):
    for x in distinct(arch, thorough=True):
        assert not faults_in(ptx_of(x, arch)), name_of(x)


def test_older_architectures_have_no_dependent_launch():
    for x in small(80):
        ptx = ptx_of(x, 80)
        assert "griddepcontrol" not in ptx and "prefetch" not in ptx and faults_in(ptx) == ["it does not wait"]


@triton.jit
def _planted(x_ptr, n, FAULT: tl.constexpr):
    if FAULT == "early return":
        if tl.program_id(0) >= n:
            return
    if FAULT != "next one not started":
        launch_dependents(True)
    if FAULT == "reads ahead":
        prefetch_to_l2(x_ptr, n, True)
    if FAULT == "early load":
        n += tl.load(x_ptr).to(tl.int32)
    if FAULT == "early store":
        tl.store(x_ptr, 1.0)
    if FAULT == "early atomic":
        tl.atomic_add(x_ptr, 1.0)
    if FAULT == "waits in a branch":
        if n > 3:
            wait_for_dependencies(True)
            tl.store(x_ptr + 1, 2.0)
    elif FAULT != "no wait":
        wait_for_dependencies(True)
    tl.store(x_ptr + n, 3.0)


FAULTS = [
    "early return", "next one not started", "early load", "early store", "early atomic", "waits in a branch", "no wait",
]  # fmt: skip


@pytest.mark.parametrize("fault", ["none", "reads ahead", *FAULTS])
def test_a_planted_fault_is_found(fault):
    signature = {"x_ptr": "*fp32", "n": "i32", "FAULT": "constexpr"}
    ptx = ir_of(ASTSource(_planted, signature, {"FAULT": fault}), 90, {"enable_fp_fusion": False}, "ptx")
    assert bool(faults_in(ptx)) == (fault in FAULTS), faults_in(ptx)


# What is read ahead


@triton.jit
def _ahead(x_ptr, n):
    prefetch_to_l2(x_ptr, n, True)


def test_one_thread_of_a_program_reads_ahead():
    source = ASTSource(_ahead, {"x_ptr": "*u8", "n": "i64"}, {})
    ptx = ir_of(source, 90, {"enable_fp_fusion": False}, "ptx")
    assert re.search(r"setp\.eq\.u32\s+is_first, thread, 0;\s*@is_first cp\.async\.bulk\.prefetch\.L2\.global", ptx)


@pytest.mark.parametrize("N, K, gated", [(768, 768, False), (50257, 768, False), (1000, 1600, True), (3, 5, False)])
@pytest.mark.parametrize("rows", (1, 8))
def test_programs_read_their_own_rows_of_the_weight_ahead(N, K, gated, rows):
    """From where the kernel reads it, and no further: all programs together, the weight or of each the most."""
    constants = linear.kernel_constants(tiles.linear_tile(rows, N * (1 + gated), K, 2, False), K, False, 0, gated, 8, True)
    block, ahead = constants["BLOCK_N"], []
    for program in range(triton.cdiv(N, block)):
        first, count = program * block, min(block, N - program * block) * K * 2
        ahead += [(start * K * 2, count) for start in ((first, first + N) if gated else (first,))]
    covered = [*sorted(ahead), (N * (1 + gated) * K * 2, 0)]
    assert all(start + count == after for (start, count), (after, _) in zip(covered, covered[1:]))


# Who has it


@pytest.fixture
def device(monkeypatch):
    """Says what a device that is not there can do: capability, driver."""

    def ask(capability, driver=None):
        has_dependent_launch.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        if driver is not None:
            monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        return has_dependent_launch(torch.device("cuda:3"))

    yield ask
    has_dependent_launch.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_compute_capability_9_has_dependent_launch(capability, device):
    assert device(capability, 13000) == (capability >= (9, 0))


def test_drivers_whose_graphs_lack_dependent_launch(device):
    """A step would not be captured as it is launched."""
    assert not device((9, 0), 12020) and device((9, 0), 12030) and not device((8, 0), 12030)


def test_cpus_have_no_dependent_launch():
    assert not has_dependent_launch(torch.device("cpu")) and dependent_launch(False) == {"PDL": False}


def call_all():
    x, lengths = meta(1, 64), meta(2, dtype=torch.int32)
    q, ids, count = meta(2, 4, 1, 64), meta(2, dtype=torch.int64), meta(1, dtype=torch.int64)
    positions = meta(2, 1, dtype=torch.int32)
    norm.norm(x, meta(64))
    linear.linear(x, meta(64, 64)), linear.linear(meta(4, 64), meta(64, 64))
    for rows in (1, 4, 40):
        linear_quantized.linear_quantized(meta(rows, 64), meta(64, 2 * 34, dtype=torch.uint8), 8, 32, False)
    moe.route(meta(1, 8), 2)
    for rows in (1, 40):
        chosen, weights = meta(rows, 2, dtype=torch.int32), meta(rows, 2, dtype=torch.float32)
        moe.moe(meta(rows, 64), chosen, weights, meta(8, 32, 64), meta(8, 64, 16))
    of_experts = meta(8 * 64, 68, dtype=torch.uint8), (8, 32, False), meta(8 * 64, 34, dtype=torch.uint8), (8, 32, False), 8
    moe_quantized.moe_quantized(x, meta(1, 2, dtype=torch.int32), meta(1, 2, dtype=torch.float32), *of_experts)
    decode_step.embed(ids, meta(9, 64)), decode_step.advance(lengths, positions)
    decode_step.record_token(ids, meta(2, 1), meta(5, 2, dtype=torch.int64), meta(2, 1, dtype=torch.float32), count)
    kv_cache_update.kv_cache_update(q, q, q, q, positions)
    attention_decode.attention_decode(q, meta(2, 4, 9, 64), meta(2, 4, 9, 64), causal=True, scale=1.0)


@pytest.mark.parametrize("has_it", (True, False))
def test_launches_are_what_their_device_has(has_it, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "has_dependent_launch", lambda device: has_it)
    with launches(90) as found:
        call_all()
    assert {launch.kernel for launch in found} == set().union(*map(names_of_launched, MODULES))
    for launch in found:
        assert launch.arguments["PDL"] == launch.options.get("launch_pdl", False) == has_it, launch.kernel
