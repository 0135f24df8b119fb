"""Checks the kernels of this package against the numerics contract on emulated machines.

python -m fastgpt.testing                  all features and dtypes, 20 seeds, C++ kernels and Triton's interpreter
python -m fastgpt.testing --seeds 2        a sample

A machine is emulated by a process in which PyTorch, its BLAS and the kernels use another instruction set, and another number of
threads. The bounds do not depend on the machine and are computed once. Prints the largest error as a fraction of its bound for
each operation, dtype and machine; exits with 1 if one is above 1, or a process fails.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastgpt.ops import attention as ops
from fastgpt.ops.attention.checks import triton_refuses_head_dims
from fastgpt.ops.attention.operators import attention_forward_triton
from fastgpt.ops.library import build_info
from fastgpt.ops.linear import linear, linear_reference
from fastgpt.ops.norm import norm, norm_reference
from fastgpt.ops.quantization import quantize
from fastgpt.testing import attention_parity, linear_features, norm_features, numerics
from fastgpt.testing.attention_features import FEATURES, PACKED_FEATURES, inputs, options, paged

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUILT = build_info()
LOWER_LEVELS = BUILT["cpu_levels"][: BUILT["cpu_levels"].index(BUILT["cpu_level"])]
MACHINES = {
    "this one": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "baseline BLAS, 1 thread": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    "AVX2 BLAS, 3 threads": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "3"},
    **{f"{level} kernels, 1 thread": {"FASTGPT_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"} for level in LOWER_LEVELS},
    "lowest kernels, baseline BLAS, 3 threads": {
        "FASTGPT_CPU_LEVEL": BUILT["cpu_levels"][0], "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "3",
    },
}  # fmt: skip
TRITON = "Triton's interpreter"
# B, H, H_kv, T, S, D, or (D, D_v) for values of another head dim; each seed takes the next one.
SHAPES = [
    (2, 4, 2, 9, 40, 16), (1, 2, 1, 37, 70, 40), (2, 2, 2, 1, 77, (24, 16)), (2, 2, 2, 1, 77, 64), (1, 2, 2, 20, 11, 24),
    (1, 2, 1, 40, 66, (72, 40)), (2, 2, 1, 3, 60, (7, 33)), (1, 2, 1, 66, 80, (192, 128)),
]  # fmt: skip
CACHES = {
    "contiguous": (None, None),
    "pages": (None, 16),
    "int8": (torch.int8, None),
    "fp8 in pages": (torch.float8_e4m3fn, 16),
}


class Case(NamedTuple):
    """run: implementation ("cpp" or "triton") -> results by name. yardsticks: () -> yardsticks of the same names."""

    operation: str
    feature: str
    dtype: torch.dtype
    run: Callable[[str], dict[str, torch.Tensor]]
    yardsticks: Callable[[], dict[str, numerics.Yardstick]]
    in_triton: bool = True  # whether the Triton kernels support the head dims


def cases(seed: int) -> Iterator[Case]:
    """One case for each feature and dtype."""
    shape = SHAPES[seed % len(SHAPES)]
    for dtype in DTYPES:
        for feature in FEATURES:
            yield attention_case(feature, shape, dtype, seed)
        for feature in PACKED_FEATURES:
            yield packed_case(feature, dtype, seed)
        for kind in CACHES:
            yield decode_case(kind, dtype, seed)
        for feature in linear_features.FEATURES:
            yield linear_case(feature, dtype, seed)
        for feature in norm_features.FEATURES:
            call = norm_features.call_of(feature, (3, 20, (1, 40, 256, 768)[seed % 4]), dtype, seed)
            yield Case("norm", feature, dtype, lambda _, call=call: {"out": norm(**call)}, of(norm_reference, call))


def of(reference: Callable, call: dict, arithmetic: torch.dtype = torch.float32) -> Callable[[], dict[str, numerics.Yardstick]]:
    double = linear_features.in_float64(call)
    return lambda: numerics.simulate(lambda: {"out": reference(**double)}, arithmetic=arithmetic)


def scaled(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], arguments: dict) -> ops.Call:
    return ops.Call(*tensors, **{"scale": tensors[0].shape[-1] ** -0.5} | arguments)


def attention_case(feature: str, shape: Any, dtype: torch.dtype, seed: int) -> Case:
    B, H, _, T, S, _ = shape
    call = scaled(inputs(*shape, dtype=dtype, seed=seed), options(feature, B, H, T, S, dtype, seed=seed + 1))
    douts = attention_parity.output_gradients(call)

    def run(implementation):
        return {"cpp": attention_parity.run_cpp, "triton": attention_parity.run_triton}[implementation](call, douts)

    return Case("attention", feature, dtype, run, lambda: attention_parity.yardsticks(call, None, douts), fits_triton(call))


def fits_triton(call: ops.Call, gradients: bool = True) -> bool:
    return triton_refuses_head_dims(call.q, call.v, gradients) is None


def packed_case(feature: str, dtype: torch.dtype, seed: int) -> Case:
    """Three packed sequences, one without queries, and one with fewer keys than queries."""
    starts = torch.tensor([[0, 20, 20, 31], [0, 33, 38, 45]], dtype=torch.int32)
    D = 24 if seed % 2 == 0 else (24, 40)
    call = scaled(inputs(1, 4, 2, 31, 45, D, dtype, seed=seed), options(feature, 1, 4, 31, 45, dtype, seed=seed + 1))
    packing = ops.Packing(starts[0], starts[1], 20, 33)
    douts = attention_parity.output_gradients(call, packing)
    runs = {"cpp": attention_parity.run_cpp_packed, "triton": attention_parity.run_triton_packed}
    return Case(
        "attention_varlen", feature, dtype, lambda implementation: runs[implementation](call, packing, douts),
        lambda: attention_parity.yardsticks(call, packing, douts), fits_triton(call),
    )  # fmt: skip


def decode_case(kind: str, dtype: torch.dtype, seed: int) -> Case:
    """One query over caches of several lengths."""
    cache_dtype, page = CACHES[kind]
    q, k, v = inputs(3, 4, 2, 1, 150, 40 if seed % 2 == 0 else (40, 24), dtype, seed=seed)
    arguments = {"k": k, "v": v}
    if cache_dtype is not None:
        (k, k_scale), (v, v_scale) = quantize(k, cache_dtype), quantize(v, cache_dtype)
        arguments = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    if page is not None:
        # Pages in random order; a pool of float8 is moved as bytes.
        moved = {name: paged(x.view(torch.int8) if x.itemsize == 1 else x, page) for name, x in arguments.items()}
        table = moved["k"][1]
        arguments = {name: pool.view(arguments[name].dtype) for name, (pool, _) in moved.items()} | {"block_table": table}
    lengths = torch.tensor([150, 61, 0], dtype=torch.int32)
    call = scaled((q, arguments.pop("k"), arguments.pop("v")), arguments | {"kv_lengths": lengths})

    def run(implementation):
        forward = attention_forward_triton if implementation == "triton" else torch.ops.fastgpt.attention_forward
        return dict(zip(("out", "lse"), forward(*call)))

    return Case("decode", kind, dtype, run, lambda: attention_parity.yardsticks(call), fits_triton(call, False))


def linear_case(feature: str, dtype: torch.dtype, seed: int) -> Case:
    """Few rows and many; with many, PyTorch's product is rounded before the activation."""
    rows, (C, N) = (1, 3, 33), ((40, 65), (768, 30))[seed % 2]
    call = linear_features.call_of(feature, sum(rows), C, N, dtype, seed)

    def run(_):
        return {"out": torch.cat([linear(**part) for part in linear_features.split(call, rows)])}

    return Case("linear", feature, dtype, run, of(linear_reference, call, dtype))


def chosen(first: int, seeds: int, implementation: str) -> Iterator[tuple[int, Case]]:
    """The cases that an implementation runs, with their numbers. Triton's interpreter computes bf16 wrongly, and is not used for
    linear and norm, which dispatch on CUDA tensors; the Triton kernels do not support all head dims."""
    number = 0
    for seed in range(first, first + seeds):
        for case in cases(seed):
            number += 1
            interpreted = case.in_triton and case.dtype != torch.bfloat16 and case.operation not in ("linear", "norm")
            if implementation == "cpp" or interpreted:
                yield number, case


def measure(path: Path, first: int, seeds: int, implementation: str) -> None:
    """Runs in the process of an emulated machine: computes all cases, and saves the results."""
    torch.save({number: case.run(implementation) for number, case in chosen(first, seeds, implementation)}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.testing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="seeds for the C++ kernels (default: 20)")
    parser.add_argument(
        "--triton-seeds", type=int, default=1, help="seeds for Triton's interpreter, which is slow (default: 1)"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--implementation", default="cpp", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        measure(args.write, args.first, args.seeds, args.implementation)
        return

    runs = {name: ("cpp", args.seeds, environment) for name, environment in MACHINES.items()}
    if args.triton_seeds and importlib.util.find_spec("triton"):
        runs[TRITON] = "triton", args.triton_seeds, {"TRITON_INTERPRET": "1"}
    results, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, (implementation, seeds, environment) in runs.items():
            path = Path(folder, "results.pt")
            command = [sys.executable, "-m", "fastgpt.testing", "--write", str(path)]
            command += ["--first", str(args.first), "--seeds", str(seeds), "--implementation", implementation]
            if subprocess.run(command, env=os.environ | environment).returncode:
                failed.append(name)
                continue
            results[name] = torch.load(path)
            print(f"{name}: {len(results[name])} cases", flush=True)

    worst: dict[tuple, tuple] = {}
    for number, case in tqdm(chosen(args.first, max(args.seeds, args.triton_seeds), "cpp"), unit="case", disable=None):
        here = {name: found[number] for name, found in results.items() if number in found}
        yardsticks = case.yardsticks() if here else {}
        for machine, found in here.items():
            for name, x in found.items():
                compared = numerics.compare(x, yardsticks[name])
                key = case.operation, machine, str(case.dtype).removeprefix("torch.")
                share = compared.share if compared.share == compared.share else float("inf")
                worst[key] = max(worst.get(key, (0.0,)), (share, case.feature, name))
                if not share <= 1:
                    print(f"above the bound on {machine}: {case.operation}, {case.feature}, {case.dtype}, {name}: {compared}")
    for (operation, machine, dtype), (share, feature, name) in worst.items():
        print(f"{operation:17} {machine:38} {dtype:9} {share:5.2f}  {name} of {feature}")
    total = sum(map(len, results.values()))
    print(f"{total} cases, largest fraction of a bound {max((share for share, *_ in worst.values()), default=0.0):.2f}")
    for name in failed:
        print(f"{name}: its process failed")
    sys.exit(bool(failed) or any(share > 1 for share, *_ in worst.values()))


if __name__ == "__main__":
    main()
