"""The machine code of the Triton kernels that ship, compiled ahead of time: no GPU is needed."""

import itertools
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.machine_code import (  # noqa: E402
    SHARED_MEMORY,
    Usage,
    compile_for,
    demanding,
    ir_of,
    source_of,
    summary,
    usage_of,
)
from benchmarks.shipped_kernels import shipped  # noqa: E402
from fastgpt.kernels import linear_quantized  # noqa: E402
from fastgpt.kernels.tiles import DECODE, quantized_tile  # noqa: E402

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter does not compile")
BULK = {"q_desc", "k_desc", "v_desc", "dout_desc"}
MODULES = [  # of fastgpt.kernels, by those that launch
    "attention_forward",
    "attention_backward",
    "attention_decode",
    "linear and linear_quantized and moe and moe_quantized and norm and decode_step and kv_cache_update",
]


def configurations(modules, arch):
    """As `shipped`, of some modules."""
    return shipped(arch, modules.split(" and "))


def faults_in_machine_code(arch, module, name, dtype, cache_dtype, constants, given):
    """What is wrong with one compiled kernel, as text; empty if nothing is."""
    compiled = compile_for(arch, getattr(import_module(module), name), dtype, cache_dtype, constants, given)
    ptx = compiled.asm["ptx"]
    faults = usage_of(compiled).faults(arch)
    if "tf32" in ptx:
        faults.append("fp32 rounded to tf32")
    if BULK & set(given) and "cp.async.bulk.tensor" not in ptx:
        faults.append("no bulk copies")
    rows = constants.get("BLOCK_N" if name == "backward_keys" else "BLOCK_M", 0)  # of the matrix units' operands
    if arch == 90 and cache_dtype.itemsize == 2 and rows >= 64 and "wgmma.mma_async" not in ptx:
        faults.append("no wgmma")
    plain = name == "attention_forward_kernel" and not set(given) - {"kv_lengths_ptr"}
    decoding = name == "attend_split_kernel" and cache_dtype is dtype
    faults += unordered_atomics(ptx)
    if "new_k_ptr" in given and re.search(r"\b(mul|add|sub)\.f32", ptx):
        faults.append("operations that may be fused, where what is stored must be the same bits as elsewhere")
    pipelined = (plain or decoding) and constants["num_stages"] > 1 and fills_vectors(constants, cache_dtype.itemsize)
    if pipelined and ("cp.async.cg" not in ptx or "cp.async.ca" in ptx):
        faults.append("copies narrower than 16 bytes")
    if cache_dtype.itemsize == 1 and "BLOCK_R" in constants and fills_vectors(constants, 1) and (narrow := narrow_copies(ptx)):
        faults.append(f"copies of {', '.join(narrow)} bytes")
    if name == "one_row_kernel" and "ld.global.v4.b32" not in ptx or name == "several_rows_kernel" and "cp.async.cg" not in ptx:
        faults.append("loads narrower than 16 bytes")
    if name.startswith("quantized") and re.search(r"ld\.global\.[bsu]8\b", ptx):
        faults.append("loads of single bytes")
    if name == "update_cache_kernel" and constants["BLOCK_T"] > 1 and constants["NEW_ALIGN"] == 16:
        # But for scales, slots and positions: one number of a row.
        if re.search(r"\b(ld|st)\.global(\.v2)?\.b(8|16)\b", ptx) or len(re.findall(r"\bst\.global\.v4", ptx)) < 2:
            faults.append("accesses narrower than 16 bytes")
    what = f"sm_{arch} {name} {dtype} {cache_dtype} {constants} {given}"
    return f"{what}: {', '.join(faults)}" if faults else ""


def unordered_atomics(ptx: str) -> list[str]:
    """Faults of the atomic operations by which programs tell that they are done.

    What any thread stored before must be visible to whoever sees the operation, and what any thread loads afterwards must see
    what others stored before theirs: so it releases and acquires, for all of the GPU, between two barriers.
    """
    events = re.findall(r"\bbar\.sync|\batom\.[\w.]+|\b(?:st|ld)\.global", ptx)
    faults = []
    for i, event in enumerate(events):
        if event.startswith("atom."):
            if not {"acq_rel", "gpu"} <= set(event.split(".")):
                faults.append(f"{event} orders too little")
            if (events[i - 1], *events[i + 1 : i + 2]) != ("bar.sync", "bar.sync"):
                faults.append(f"{event} without a barrier before and after it")
    return faults


def test_counters_of_done_programs_are_atomic_and_ordered():
    """Of one kernel that rotates, stores and attends; the slow tests look at all."""
    given = {"acc_ptr", "new_k_ptr", "cos_ptr"}
    shipped = configurations("attention_decode", 90)
    chosen = (x for x in shipped if given <= set(x[4]) and x[3]["HEAD_DIM"] == 64 and x[3]["BLOCK_M"] == 16)
    ptx = compile_for(90, *next(chosen)).asm["ptx"]
    assert ptx.count("atom.") == 2 and not unordered_atomics(ptx)
    assert unordered_atomics(ptx.replace("bar.sync", "")) and unordered_atomics(ptx.replace("acq_rel", "relaxed"))


def fills_vectors(constants: dict, element_size: int) -> bool:
    """Whether each tile of keys and values has 16 bytes for each thread."""
    columns = min(x for x in (constants["BLOCK_D"], constants["BLOCK_R"], constants["BLOCK_V"]) if x)
    return constants["BLOCK_N"] * columns * element_size >= 16 * 32 * constants["num_warps"]


def narrow_copies(ptx: str) -> set[str]:
    """The bytes that a thread copies to shared memory, or reads from there, at once, as numbers; but those of whole vectors and
    of a scale."""
    copied = {int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)}
    return {str(size) for size in copied - {4, 16}} | ({"1"} if re.search(r"ld\.shared\.[su]8", ptx) else set())


EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def one_that_ships(module, arch, cache_dtype, given, dtype=torch.float16, head_dim=128):
    """A kernel of few rows, if tiles differ in that, with just these optional arguments."""
    for configuration in configurations(module, arch):
        _, q_dtype, kv_dtype, constants, arguments = configuration
        few = module != "attention_decode" or constants["BLOCK_M"] == 16
        if few and (q_dtype, kv_dtype, constants["HEAD_DIM"], set(arguments)) == (dtype, cache_dtype, head_dim, set(given)):
            return configuration
    raise ValueError(f"given: expected what ships, got {given}")


SCALES = ("k_scale_ptr", "v_scale_ptr")
LENGTHS = ("acc_ptr", "softmax_ptr", "counters_ptr", "kv_lengths_ptr")


@pytest.mark.slow
@pytest.mark.parametrize("arch", (pytest.param(80, marks=pytest.mark.exhaustive), 90))
@pytest.mark.parametrize(
    "module, cache_dtype, given",
    [
        ("attention_decode", torch.int8, (*LENGTHS, *SCALES)),
        ("attention_decode", torch.float8_e4m3fn, (*LENGTHS, *SCALES)),
        ("attention_forward", torch.int8, ("kv_lengths_ptr", "block_table_ptr", *SCALES)),
    ],
    ids=("int8", "fp8", "prefill"),
)  # fmt: skip
def test_keys_and_values_of_8_bits_are_copied_16_bytes_at_a_time(module, cache_dtype, given, arch):
    """And read so from shared memory; then the matrix units get 16 bits of each number from there."""
    ptx = compile_for(arch, *one_that_ships(module, arch, cache_dtype, given)).asm["ptx"]
    assert "cp.async.cg" in ptx and not narrow_copies(ptx)
    assert narrow_copies(ptx.replace(", 0x10", ", 0x8")) == {"8"}


def tiles_underway(ttgir: str) -> list[int]:
    """Of each loop with two products of matrices, or three where K is held in two blocks, that copies each operand as a group,
    tile after tile: tiles whose copies have begun and are not waited for while the loop multiplies."""
    found, waits, copies, dots = [], [], 0, 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            waits, copies, dots = [], 0, 0
        elif match := re.search(r"ttg\.async_wait .*num = (\d+)", line):
            waits.append(int(match[1]))
        elif "ttg.async_commit_group" in line:
            copies += 1
        elif re.search(r"\btt\.dot\b|warp_group_dot\b", line):
            dots += 1
        elif "scf.yield" in line:
            if dots >= 2 and copies:
                found.append(min(waits) // copies)
            dots = 0
    return found


@pytest.mark.parametrize("arch", (90, pytest.param(80, marks=pytest.mark.slow)))
@pytest.mark.parametrize("given, cache_dtype", [
    ((), torch.float16), ((*LENGTHS, "block_table_ptr"), torch.float16), ((*LENGTHS, *SCALES), torch.int8),
], ids=("contiguous", "paged", "8 bits"))  # fmt: skip
def test_decoding_overlaps_copies_with_matrix_products(given, cache_dtype, arch):
    """From memory in order and through a block table, whose look-up takes none of the copies' stages."""
    source, options = source_of(*one_that_ships("attention_decode", arch, cache_dtype, given))
    ttgir = ir_of(source, arch, options, "ttgir")
    assert tiles_underway(ttgir) == [1]
    widths = re.findall(r"async_copy_global_to_local .*contiguity = (\d+) : .*: tensor<\d+x\d+x", ttgir)
    assert widths and {int(width) * cache_dtype.itemsize for width in widths} == {16}


@pytest.mark.parametrize("arch, underway", [(90, 1), pytest.param(100, 1, marks=pytest.mark.slow), (80, 0)])
@pytest.mark.parametrize("given, cache_dtype", [
    (LENGTHS, torch.float16), ((*LENGTHS, "block_table_ptr"), torch.float16),
    pytest.param((*LENGTHS, *SCALES), torch.int8, marks=pytest.mark.slow),
], ids=("contiguous", "paged", "8 bits"))  # fmt: skip
def test_decoding_wide_heads_overlaps_copies_where_shared_memory_allows(given, cache_dtype, arch, underway):
    """Of head dims 576 and 512 (MLA), two tiles of K and V take more than the 99 KiB that code for 8.0 may use."""
    source, options = source_of(*one_that_ships("attention_decode", arch, cache_dtype, given, head_dim=576))
    assert tiles_underway(ir_of(source, arch, options, "ttgir")) == [underway]


def test_decoding_many_rows_overlaps_copies():
    """With the tile for the widest heads but those above, and no tile of 16 bits has fewer stages."""
    shipped = configurations("attention_decode", 90)
    chosen = (x for x in shipped if x[1] is x[2] is torch.float16 and x[3]["HEAD_DIM"] == 256 and x[3]["BLOCK_M"] > 16)
    source, options = source_of(*next(chosen))
    assert tiles_underway(ir_of(source, 90, options, "ttgir")) == [1]
    assert all(tile.num_stages >= 3 for (dim, size), pair in DECODE.items() if size == 2 and dim <= 256 for tile in pair)


def test_a_row_is_multiplied_with_quantized_weights_where_they_are_loaded():
    """Threads have the columns of x that their integers, in words of 2 or 4 bytes, are multiplied with, and the scales: nothing goes
    through shared memory."""
    for bits, minima in itertools.product((8, 4), (False, True)):
        tile = quantized_tile(1, 6144, 8192, bits, 2)
        constants = linear_quantized.kernel_constants(tile, 8192, bits, 32, minima, True, 0, False, 1, False, True)
        kernel, dtype = linear_quantized.quantized_one_row_kernel, torch.float16
        source, options = source_of(kernel, dtype, dtype, constants, ("norm_weight_ptr",))
        text = ir_of(source, 90, options, "ttgir")
        loop = text[text.rindex("scf.for") : text.rindex("scf.yield")]
        assert f"!tt.ptr<i{32 if minima else 16}>" in loop and "tt.ptr<i8>" not in loop
        assert "convert_layout" not in loop and "ttg.local" not in loop


SCORES = ("mask_ptr", "bias_ptr")


def widths_of_scores(configuration) -> dict[str, set[int]]:
    """Bytes that a thread copies at once of tiles of a bias in fp16, "f16", and a mask, "i8", of as many columns as keys."""
    source, options = source_of(*configuration)
    found = {}
    tile = rf"tensor<\d+x{configuration[3]['BLOCK_N']}x!tt.ptr<(f16|i8)>"
    for line in ir_of(source, 90, options, "ttgir").splitlines():
        if match := re.search(rf"async_copy_global_to_local .*contiguity = (\d+) : .*: {tile}", line):
            found.setdefault(match[2], set()).add(int(match[1]) * (2 if match[2] == "f16" else 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module, given", [
    ("attention_decode", (*LENGTHS[:3], *SCORES)), ("attention_forward", (*SCORES, "sinks_ptr")),
], ids=("decode", "forward"))  # fmt: skip
def test_masks_and_biases_are_copied_in_vectors(module, given):
    """Ahead of their use, as keys and values are; a mask in as many bytes as there are for each thread."""
    assert widths_of_scores(one_that_ships(module, 90, torch.float16, given)) == {"f16": {16}, "i8": {8}}


@pytest.mark.slow
@pytest.mark.parametrize("unit", (0, 1), ids=("any strides", "rows that begin anywhere"))
def test_other_masks_and_biases_are_read_without_copies(unit):
    *which, constants, given = one_that_ships("attention_forward", 90, torch.float16, (*SCORES, "sinks_ptr"))
    assert not widths_of_scores((*which, constants | {"MASK_UNIT": unit, "BIAS_UNIT": unit}, given))


def test_tiles_underway_are_counted():
    *which, constants, given = one_that_ships("attention_decode", 90, torch.float16, ())
    for stages in (2, 4):
        source, options = source_of(*which, constants | {"num_stages": stages}, given)
        assert tiles_underway(ir_of(source, 90, options, "ttgir")) == [stages - 2]


def reductions_folded_into_loops(ttir: str) -> list[str]:
    """Loops of which a result only adds up, or is the maximum of, what is reduced in each iteration, and has several uses. Not
    those with matrix products, whose tiles lie otherwise."""
    lines, found = ttir.splitlines(), []
    indents = [len(line) - len(line.lstrip()) for line in lines]
    for i, line in enumerate(lines):
        loop = re.match(r"\s*(%\w+)(:\d+)? = scf\.for .*iter_args\((.*?)\) ->", line)
        if loop is None:
            continue
        end = next(k for k in range(i + 1, len(lines)) if indents[k] <= indents[i])
        after = next(k for k in range(end, len(lines)) if indents[k] < indents[i])  # where its results are known no more
        body, scope = "\n".join(lines[i + 1 : end]), "\n".join(lines[end:after])
        made = {match[1]: match[2] for match in re.finditer(r"(%\w+) = (.*)", body)}
        values = re.findall(r"%[\w#]+", lines[end - 1])
        for place, (name, value) in enumerate(zip(re.findall(r"(%\w+) = ", loop[3]), values, strict=True)):
            operands = re.match(r"arith\.(?:addf|mulf|m(?:ax|in)(?:num|imum)f) (%\w+), (%\w+)", made.get(value, ""))
            others = {*operands.groups()} - {name} if operands else ()
            folds = len(others) == 1 and "tt.reduce" in made.get(*others, "") and uses_of(value, body) == 2
            if folds and "tt.dot" not in body and uses_of(f"{loop[1]}#{place}" if loop[2] else loop[1], scope) > 1:
                found.append(line.strip())
    return found


def uses_of(name: str, text: str) -> int:
    return len(re.findall(rf"{name}(?![\w#])", text))


@triton.jit
def _folds(x_ptr, n, IN_LOOP: tl.constexpr):
    offsets = tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    largest = tl.zeros([64], tl.float32)
    tile = tl.zeros([64, 16], tl.float32)
    for i in range(n):
        x = tl.load(x_ptr + i.to(tl.int64) * 1024 + offsets)
        if IN_LOOP:
            largest = tl.maximum(largest, tl.max(x, 1))
        else:
            tile = tl.maximum(tile, x)
    if not IN_LOOP:
        largest = tl.max(tile, 1)
    tl.store(x_ptr + tl.arange(0, 64), largest * 2 + tl.where(largest > 1, 1.0, 0.0))


def test_reductions_folded_into_loops_are_found():
    for in_loop in (True, False):
        source = ASTSource(_folds, {"x_ptr": "*fp32", "n": "i32", "IN_LOOP": "constexpr"}, {"IN_LOOP": in_loop})
        assert len(reductions_folded_into_loops(ir_of(source, 90, {"enable_fp_fusion": True}, "ttir"))) == in_loop


@pytest.mark.slow
@pytest.mark.parametrize("modules", MODULES)
def test_no_reduction_is_folded_into_a_loop(modules):
    """Triton 3.6 fails an assertion where the result of such a loop has two uses (OptimizeThreadLocality.cpp, hasOneUse)."""
    chosen = {}
    for x in configurations(modules, 90):
        if x[1] is not torch.bfloat16 and x[3].get("HEAD_DIM", 64) == 64:
            tells = x[3].get("RMS"), x[3].get("GATED"), "acc_ptr" in x[4], "new_k_ptr" in x[4]
            chosen.setdefault((x[0].__name__, x[1], *tells), x)
    for function, dtype, cache_dtype, constants, given in chosen.values():
        source, options = source_of(function, dtype, cache_dtype, constants, given)
        assert not reductions_folded_into_loops(ir_of(source, 90, options, "ttir")), (function, dtype, given)


def copies_underway(ttgir: str) -> list[int]:
    """Of each loop and tensor that it copies in bulk, tile after tile: tiles whose copies have begun and are not waited for,
    at the least, while the loop waits for one before them."""
    copy, waits = re.compile(r"ttng\.async_tma_copy_global_to_local (%\w+)\["), "ttng.wait_barrier"
    found, before, loop = [], Counter(), None
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loop, waited = Counter(), False
        elif "scf.yield" in line and loop is not None:
            # One tile of those that began is waited for; and one more has begun if the loop copies before it waits.
            found += [before[tensor] - 1 + early for tensor, early in loop.items()]
            before, loop = Counter(), None
        elif match := copy.search(line):
            if loop is None:
                before[match[1]] += 1
            else:
                loop[match[1]] = not waited
        elif waits in line and loop is not None:
            waited = True
    return found


@pytest.mark.parametrize("stages, underway", [(2, 0), (3, 1)])
def test_copies_underway_are_counted(stages, underway):
    """Where a loop waits for what it has begun to copy at the end of the last iteration, no product covers the copy."""
    function, dtype, cache_dtype, constants, given = next(hopper_forward())
    source, options = source_of(function, dtype, cache_dtype, constants | {"num_stages": stages}, given)
    # Of K and V, in the loop without masks and the one with.
    assert copies_underway(ir_of(source, 90, options, "ttgir")) == [underway] * 4


def hopper_forward():
    """The forward kernels of head dim 128 in fp16 that have bulk copies and no more than a window and lengths of their own."""
    for configuration in shipped(90, ["attention_forward"]):
        _, dtype, _, constants, given = configuration
        if dtype is torch.float16 and constants["HEAD_DIM"] == 128 and BULK <= {*given, "dout_desc"}:
            if set(given) - BULK <= {"kv_lengths_ptr", "sinks_ptr"}:
                yield configuration


def test_hopper_overlaps_copies_with_matrix_products():
    """Forward, at the commonest head dim: the wait for a tile comes a whole tile after its copy began."""
    deep = {}
    for _, _, _, constants, given in hopper_forward():
        variant = constants["IS_CAUSAL"], constants["HAS_WINDOW"], "kv_lengths_ptr" in given
        if variant not in deep:
            deep[variant] = constants["num_stages"] == 3
    assert len(deep) == 8 and all(deep.values())
    source, options = source_of(*next(hopper_forward()))
    underway = copies_underway(ir_of(source, 90, options, "ttgir"))
    assert underway and min(underway) >= 1


def test_summary_of_compiled_configurations():
    found = [(Usage(40, 0, 10 << 10), ""), (Usage(255, 8, 2 << 10), "sm_90 norm_kernel: spills 8 bytes")]
    assert summary(5, found) == (
        "5 configurations ship, 2 were compiled, 1 of them without spills and within shared memory; at most 255 registers, "
        "8 bytes spilled, 10 KiB of shared memory"
    )
    assert summary(5, []).startswith("5 configurations ship, 0 were compiled")


def assert_sound(arch, chosen):
    jobs = [(arch, function.__module__, function.__name__, *rest) for function, *rest in chosen]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        faults = [fault for fault in pool.map(faults_in_machine_code, *zip(*jobs, strict=True), chunksize=4) if fault]
    assert jobs and not faults, "\n".join(faults)


def chosen_demanding(modules, arch):
    """Those in fp32, which use the same instructions everywhere, and those that store a token and attend, for one
    architecture."""
    chosen = demanding(configurations(modules, arch))
    return [x for x in chosen if x[1] is not torch.float32 and not {"acc_ptr", "new_k_ptr"} <= {*x[4]} or arch == 90]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 120, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 89, 100))])
def test_one_of_each_kernel(arch):
    """The most demanding in 16 bits, of the commonest head dim."""
    one = {}
    for modules in MODULES:
        for x in chosen_demanding(modules, arch):
            if x[1].itemsize == 2 and x[3].get("HEAD_DIM", 128) == 128:
                one.setdefault(x[0].__name__, x)
    assert_sound(arch, one.values())


@pytest.mark.slow
def test_a_new_token_in_8_bits_with_all_features_does_not_spill():
    """Of head dim 160, whose keys are held in two blocks: what takes most registers of all that decodes."""
    chosen = [
        x
        for x in chosen_demanding("attention_decode", 90)
        if (x[1], x[3]["HEAD_DIM"]) == (torch.float16, 160) and {"new_k_ptr", "sinks_ptr"} <= {*x[4]}
    ]
    assert [(x[2], x[3]["num_warps"]) for x in chosen] == [(torch.float8_e4m3fn, 8)]
    assert_sound(90, chosen)


def of(head_dim: int, dtype, *given: str, without=(), cache_dtype=None, **constants):
    """Tells a configuration of this head dim and dtype, with these optional arguments and constants."""
    return lambda configuration: (
        configuration[1:3] == (dtype, cache_dtype or dtype)
        and {*given} <= {*configuration[4]} - {*without} == {*configuration[4]}
        and {"HEAD_DIM": head_dim, **constants}.items() <= configuration[3].items()
    )


def of_columns(K: int, dtype):
    return lambda configuration: configuration[1] == dtype and configuration[3]["K"] == K


@pytest.mark.slow
@pytest.mark.parametrize("arch, kernel, is_it", [
    (80, "expert_down_kernel", of_columns(14336, torch.bfloat16)),
    (120, "expert_up_kernel", of_columns(7168, torch.bfloat16)),
    (90, "backward_keys", of(32, torch.float16, "alibi_ptr", "bias_ptr", "seed_ptr", "q_desc", without=("cu_q_ptr", "mask_ptr", "kv_lengths_ptr", "sinks_ptr"), IS_CAUSAL=True, HAS_WINDOW=False, HAS_SOFTCAP=True, BIAS_UNIT=8)),
    (120, "attention_forward_kernel", of(40, torch.float16, HAS_WINDOW=True, without=("kv_lengths_ptr", "cu_q_ptr", "seed_ptr"))),
    (100, "attention_forward_kernel", of(576, torch.float32, "mask_ptr", "bias_ptr")),
    (120, "attention_forward_kernel", of(576, torch.float32, without=("kv_lengths_ptr", "cu_q_ptr", "seed_ptr"))),
    (120, "backward_keys", of(32, torch.float16, "alibi_ptr", "seed_ptr", without=("kv_lengths_ptr",), IS_CAUSAL=True)),
    (90, "attention_forward_kernel", of(128, torch.bfloat16, "kv_lengths_ptr", "q_desc", IS_CAUSAL=False)),
    (100, "backward_keys", of(64, torch.bfloat16, "cu_q_ptr", "q_desc", without=("seed_ptr",), IS_CAUSAL=True)),
    (89, "attend_split_kernel", of(160, torch.float32, "mask_ptr", "bias_ptr", SPLIT=1024)),
    (100, "backward_keys", of(32, torch.bfloat16, "cu_q_ptr", "q_desc", without=("seed_ptr",), IS_CAUSAL=True)),
    (120, "backward_keys", of(192, torch.float32, "cu_q_ptr", without=("seed_ptr",), IS_CAUSAL=True)),
    (90, "attend_split_kernel", of(576, torch.bfloat16, "block_table_ptr", SPLIT=1024)),
    (89, "attend_split_kernel", of(576, torch.float32, "new_k_ptr", "softcap", cache_dtype=torch.int8, SPLIT=1024)),
    (100, "attend_split_kernel", of(160, torch.float32, "new_k_ptr", "sinks_ptr", cache_dtype=torch.float8_e4m3fn, SPLIT=1024)),
    (80, "attend_split_kernel", of(576, torch.float32, "mask_ptr", "bias_ptr")),
    (120, "attention_forward_kernel", of(64, torch.float16, "alibi_ptr", "seed_ptr", "bias_ptr", IS_CAUSAL=True)),
    (120, "attend_split_kernel", of(160, torch.float32, without=("new_k_ptr", "window"), cache_dtype=torch.int8, SPLIT=1024)),
    (80, "attend_split_kernel", of(80, torch.float16, "window", without=("new_k_ptr",), cache_dtype=torch.float8_e4m3fn, SPLIT=1024)),
    (89, "attention_forward_kernel", of(80, torch.float16, without=("kv_lengths_ptr", "cu_q_ptr", "seed_ptr"), IS_CAUSAL=True)),
    (80, "backward_keys", of(128, torch.float16, "alibi_ptr", "bias_ptr", "seed_ptr", without=("cu_q_ptr", "mask_ptr", "kv_lengths_ptr", "sinks_ptr"), IS_CAUSAL=True, HAS_WINDOW=False, HAS_SOFTCAP=True, BIAS_UNIT=8)),
    (90, "backward_keys", of(128, torch.float16, "cu_q_ptr", "q_desc", without=("seed_ptr",), IS_CAUSAL=True, HAS_WINDOW=True)),
    (90, "backward_keys", of(80, torch.bfloat16, "cu_q_ptr", "q_desc", without=("seed_ptr",), IS_CAUSAL=True, HAS_WINDOW=False)),
    (100, "backward_keys", of(20, torch.float16, "cu_q_ptr", without=("seed_ptr", "q_desc"), IS_CAUSAL=True, HAS_WINDOW=False)),
], ids=("experts", "experts, PDL", "extras 32", "partial blocks", "wide fp32", "wide fp32, no features", "extras", "lengths", "packed 64", "mask, bias", "packed", "packed fp32", "wide pages", "wide fp32, 8 bits", "fp32, 8 bits", "wide fp32, mask", "extras 64", "fp32, int8", "fp8 80", "partial blocks 80", "extras 128", "packed 128, window", "packed 80", "packed 20"))  # fmt: skip
def test_configurations_that_once_spilled_do_not(arch, kernel, is_it):
    """Of kernels that once did, or took too much shared memory, one each."""
    modules = {
        "attention_forward_kernel": "attention_forward",
        "attend_split_kernel": "attention_decode",
        "backward_keys": "attention_backward",
    }
    every = shipped(arch, [modules.get(kernel, "moe")])
    assert_sound(arch, [next(x for x in every if x[0].__name__ == kernel and is_it(x))])


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("modules", MODULES)
def test_demanding_kernels(modules, arch):
    assert_sound(arch, chosen_demanding(modules, arch))


@pytest.mark.exhaustive
@pytest.mark.skipif("FASTGPT_TEST_ALL_MACHINE_CODE" not in os.environ, reason="FASTGPT_TEST_ALL_MACHINE_CODE=1 takes hours")
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("modules", MODULES)
def test_every_kernel(modules, arch):
    assert_sound(arch, configurations(modules, arch))
