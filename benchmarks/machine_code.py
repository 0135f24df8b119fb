"""The machine code of Triton kernels, compiled for an architecture without a GPU, and what it takes there.

python -m benchmarks.machine_code [--arch 80 89 90 100 120] [--pairs] [--first N] [--share I/N] [--workers N]

Compiles every configuration that ships (shipped_kernels.py), of each architecture, on all cores, and counts those that compile
without spilling and within the architecture's shared memory. That takes many hours; --pairs takes a twentieth of them, in which every
pair of choices occurs (pairwise.py): of an architecture, a dtype, head dims, a tile, the arguments given, each flag. --first 100
takes the first 100 of these, those with the most pairs; --share 3/50 every 50th from the third on. What is compiled stays in
Triton's cache: a run after one that was cut goes on there, and one after a change compiles what that changed. The last line
sums up all architectures. Exits with 1 if one does not.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from benchmarks.pairwise import pairwise_cover
from benchmarks.shipped_kernels import shipped
from fastgpt.kernels.tiles import Tile

# Shared memory a block may use, in bytes. A chip of compute capability 8.0 has 163 KiB, but 8.6 runs its code in 99 KiB.
SHARED_MEMORY = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
ELEMENTS = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.float8_e4m3fn: "u8",
}  # fmt: skip
# Of arguments that are neither 32-bit integers nor of the inputs' dtype.
TYPES = {
    "mask_ptr": "*u8", "blocks_ptr": "*u8", "ended_ptr": "*u8", "extreme_ptr": "*fp32",
    **dict.fromkeys(("seed_ptr", "ids_ptr", "token_ptr", "tokens_ptr", "step_ptr", "eos_ptr", "order_ptr"), "*i64"),
    **dict.fromkeys(("scale", "softcap", "keep_scale", "eps", "offset"), "fp32"),
    **dict.fromkeys(
        (
            "kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "block_table_ptr", "counters_ptr", "slots_ptr", "positions_ptr",
            "lengths_ptr", "experts_ptr", "starts_ptr", "block_ends_ptr",
        ),
        "*i32",
    ),
    **dict.fromkeys(
        (
            "lse_ptr", "dlse_ptr", "shift_ptr", "delta_ptr", "norm_ptr", "alibi_ptr", "k_scale_ptr", "v_scale_ptr", "acc_ptr",
            "softmax_ptr", "cos_ptr", "sin_ptr", "weights_ptr", "selection_bias_ptr", "hidden_ptr", "products_ptr",
        ),
        "*fp32",
    ),
}  # fmt: skip
# Where a launch may give None, or what does not start at a multiple of 16 bytes.
OPTIONAL = {
    "kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr", "bias_ptr", "block_table_ptr",
    "k_scale_ptr", "v_scale_ptr", "seed_ptr", "q_desc", "dout_desc", "k_desc", "v_desc", "q_rest_desc", "k_rest_desc",
    "acc_ptr", "softmax_ptr",
    "residual_ptr", "norm_weight_ptr", "norm_bias_ptr", "dlse_ptr", "position_weight_ptr", "ended_ptr", "eos_ptr",
    "counters_ptr", "new_k_ptr", "new_v_ptr", "slots_ptr", "positions_ptr", "cos_ptr", "sin_ptr", "new_q_ptr",
    "rotated_q_ptr", "selection_bias_ptr",
}  # fmt: skip
ALIGNED = {"acc_ptr", "softmax_ptr", "norm_weight_ptr", "norm_bias_ptr"}  # of these, what does


class Usage(NamedTuple):
    registers: int  # a thread
    spilled: int  # bytes of a thread's memory
    shared: int  # bytes of a block

    def faults(self, arch: int) -> list[str]:
        """What no kernel that ships may do."""
        spills = [f"spills {self.spilled} bytes at {self.registers} registers"] if self.spilled else []
        too_much = [f"{self.shared} bytes of shared memory"] if self.shared > SHARED_MEMORY[arch] else []
        return spills + too_much


def compile_for(arch: int, function, dtype: torch.dtype, cache_dtype: torch.dtype, constants: dict, given):
    """A kernel, compiled: see source_of."""
    source, options = source_of(function, dtype, cache_dtype, constants, given)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def source_of(function, dtype: torch.dtype, cache_dtype: torch.dtype, constants: dict, given) -> tuple[ASTSource, dict]:
    """A kernel as a launch compiles it, and the options: rows start at multiples of 16 bytes, nothing else is specialized.

    Args: dtype of q, cache_dtype of k and v; constants: compile-time arguments and options; given: names of the optional
        arguments that are not None.
    """
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    optional = OPTIONAL if "HAS_WINDOW" in function.arg_names else OPTIONAL | {"softcap", "window"}
    constants |= {name: None for name in optional if name in function.arg_names and name not in given}
    element = ELEMENTS[dtype]

    def type_of(name):
        if name.endswith("_desc"):
            rows = constants["BLOCK_N" if name[0] in "kv" else "BLOCK_M"]
            columns = "BLOCK_R" if "rest" in name else "BLOCK_V" if name in ("v_desc", "dout_desc") else "BLOCK_D"
            return f"tensordesc<{element}[1, 1, {rows}, {constants[columns]}]>"
        if name in ("k_ptr", "v_ptr"):
            return f"*{ELEMENTS[cache_dtype]}"
        return TYPES.get(name, f"*{element}" if name.endswith("_ptr") else "i32")

    signature = {name: type_of(name) for name in function.arg_names} | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and (name not in OPTIONAL or name in ALIGNED)
    }
    return ASTSource(function, signature, constants, aligned), options


def ir_of(source: ASTSource, arch: int, options: dict, stage: str) -> str:
    """The text of a kernel's intermediate representation after the passes of a stage: "ttir", "ttgir", "llir" or "ptx"."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({**options, **source.parse_options()})
    stages = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code_generators = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, code_generators, backend.get_module_map(), context)
    for name, passes in stages.items():
        module = passes(module, {"num_warps": options.num_warps})
        if name == stage:
            return module if isinstance(module, str) else module.str_nodebug()
    raise ValueError(f"stage: expected one of {', '.join(stages)}, got {stage!r}")


def usage_of(compiled) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(registers, stack + local, compiled.metadata.shared)


def demanding(configurations) -> list:
    """Of each tile, the kernels under the most register pressure: every mask, every feature; and, as most of their registers
    go to the tile, those of nothing but a whole head dim. With bulk copies, where a call may have them.

    configurations: (kernel, or its name, dtype, the cache's dtype, constants, optional arguments given), as of
    benchmarks.shipped_kernels.
    """
    chosen = {}
    for configuration in configurations:
        function, dtype, cache_dtype, constants, given = configuration
        name = getattr(function, "__name__", function)
        features = frozenset(name for name in given if not name.endswith("_desc"))
        if dtype is torch.bfloat16 or not _is_demanding(name, constants, features):
            continue
        of_tile = Tile._fields if "V_DIM" in constants else ()  # other kernels' tiles follow from what they work on
        key = (name, dtype, cache_dtype, features, tuple(constants[n] for n in constants if n not in of_tile))
        if key not in chosen or len(given) > len(features):
            chosen[key] = configuration
    return list(chosen.values())


def _is_demanding(name: str, constants: dict, features: frozenset) -> bool:
    if name in ("delta_kernel", "embed_kernel", "advance_kernel", "record_token_kernel"):
        return True
    if name == "update_cache_kernel":
        return {"block_table_ptr", "cos_ptr", "k_scale_ptr"} < features
    if name == "norm_kernel":
        return "residual_ptr" in features
    if name in ("one_row_kernel", "several_rows_kernel"):  # of some models, and tiles of the fewest rows and of the most
        return bool(constants["ACTIVATION"]) and constants["K"] != 2048 and constants.get("BLOCK_M") in (None, 16, 64)
    if name == "route_kernel":
        return constants["TOP_GROUPS"] < constants["GROUPS"]
    if name.startswith(("expert_", "grouped_", "sum_experts_", "quantized_expert_")):
        return "bias_ptr" in features or "residual_ptr" in features
    if name.startswith("quantized"):
        return bool(constants["ACTIVATION"])
    if "new_k_ptr" in features and constants["BLOCK_M"] > 16:  # for more heads than most models have
        return False
    if constants["V_DIM"] == constants["BLOCK_V"]:
        if "new_k_ptr" in features:
            return {"cos_ptr", "k_scale_ptr"} < features and "block_table_ptr" not in features
        return not features and constants["IS_CAUSAL"] and name != "attend_split_kernel"
    if name == "attend_split_kernel":
        return "sinks_ptr" in features
    packed = {"cu_q_ptr", "cu_k_ptr"}
    if name == "backward_keys" and features == packed:  # whose tiles depend on the mask
        return True
    if not constants["IS_CAUSAL"] or constants.get("ONE_ROW") or constants.get("ONE_COLUMN"):
        return False
    with_extras = {"bias_ptr", "seed_ptr", "mask_ptr" if name.startswith("backward") else "alibi_ptr"}
    return features in ({"kv_lengths_ptr"}, packed) or with_extras <= features


def usage_and_fault(arch: int, module: str, name: str, *configuration) -> tuple[Usage, str]:
    """What a kernel takes, and what is wrong with its machine code, and which it is; empty if nothing is."""
    what = f"sm_{arch} {name} {configuration}"
    try:
        usage = usage_of(compile_for(arch, getattr(import_module(module), name), *configuration))
    except Exception as error:  # whatever keeps one from compiling, the others are compiled
        return Usage(0, 0, 0), f"{what}: {type(error).__name__}: {error}"
    faults = usage.faults(arch)
    return usage, f"{what}: {', '.join(faults)}" if faults else ""


def summary(n_shipped: int, found: list[tuple[Usage, str]]) -> str:
    """Of what `usage_and_fault` found: how much of what ships that is, and the most that a kernel takes."""
    most = Usage(*map(max, zip(Usage(0, 0, 0), *(usage for usage, _ in found), strict=True)))
    return (
        f"{n_shipped} configurations ship, {len(found)} were compiled, {sum(not fault for _, fault in found)} of them without "
        f"spills and within shared memory; at most {most.registers} registers, {most.spilled} bytes spilled, "
        f"{most.shared / 1024:.0f} KiB of shared memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--pairs", action="store_true", help="as many configurations as have every pair of choices")
    parser.add_argument("--first", type=int, metavar="N", help="the first N of those")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every N-th configuration from the I-th on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    first, step = map(int, args.share.split("/"))
    begin = time.perf_counter()
    all_shipped = [(arch, configuration) for arch in args.arch for configuration in shipped(arch)]
    chosen = (pairwise_cover(all_shipped) if args.pairs else all_shipped)[: args.first][first - 1 :: step]
    print(f"{len(all_shipped)} configurations ship, {len(chosen)} are compiled", flush=True)
    jobs = [(arch, function.__module__, function.__name__, *rest) for arch, (function, *rest) in chosen]
    found = []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for usage, fault in pool.map(usage_and_fault, *zip(*jobs, strict=True)):
            found.append((usage, fault))
            if fault:
                print(fault, flush=True)
            if len(found) % 50 == 0:
                print(f"{len(found)} of {len(jobs)}", flush=True)
    for arch in args.arch:
        of_arch = [result for result, job in zip(found, jobs, strict=True) if job[0] == arch]
        print(f"sm_{arch}: {summary(sum(each == arch for each, _ in all_shipped), of_arch)}")
    print(f"{len(args.arch)} architectures: {summary(len(all_shipped), found)}; {time.perf_counter() - begin:.0f} s")
    sys.exit(any(fault for _, fault in found))


if __name__ == "__main__":
    main()
