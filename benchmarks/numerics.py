"""Errors of every operation against the reference in float64, as fractions of the bounds of the numerics contract.

python -m benchmarks.numerics              prints them and writes results/<machine>/numerics.json
python -m benchmarks.numerics --levels     also the C++ kernels at the lower CPU levels of this machine
python -m benchmarks.numerics --operation decode     one operation only, without storing results

Each implementation runs in a separate process; the Triton kernels on the GPU, or without one in Triton's interpreter. A case is an
operation, a feature of it, a dtype and an implementation, over several shapes. Its `errors` and `shares` are the largest of each
tensor, and `exact` says whether a cache has the same bits as with the reference. Exits with 1 if a fraction is above 1, a cache
differs, or a process fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

import fastgpt
from benchmarks import numerics_table, report
from benchmarks.table import aligned
from fastgpt.ops import attention as ops
from fastgpt.ops.attention.operators import attention_forward_triton
from fastgpt.ops.implementations import TRITON_INSTALLED
from fastgpt.ops.kv_cache_update import rope_reference
from fastgpt.ops.library import CUDA_MISSING
from fastgpt.ops.quantization import quantize

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # whose helpers decide what passes

from cache_updates import angles, differing, on, update_inputs  # noqa: E402
from cpu_levels import lower_levels  # noqa: E402

from fastgpt.testing import attention_parity as parity  # noqa: E402
from fastgpt.testing.attention_features import FEATURES, PACKED_FEATURES, inputs, options, paged  # noqa: E402
from fastgpt.testing.linear_features import FEATURES as LINEAR_FEATURES  # noqa: E402
from fastgpt.testing.linear_features import call_of, in_float64, split  # noqa: E402
from fastgpt.testing.norm_features import FEATURES as NORM_FEATURES  # noqa: E402
from fastgpt.testing.norm_features import call_of as norm_call  # noqa: E402
from fastgpt.testing.numerics import share_of_bound  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# B, H, H_kv, T, S, D; the last for those that need not wait for the interpreter.
SHAPES = [(2, 4, 2, 37, 70, 40), (2, 3, 1, 3, 33, 64), (1, 2, 2, 40, 21, 16), (1, 4, 1, 300, 700, 80)]
DECODE_SHAPES = [(3, 4, 2, 1, 600, 64), (3, 6, 2, 3, 99, 40), (3, 8, 2, 1, 5000, 128)]
UPDATE_SHAPES = [(1, 12, 1, 100, 64), (3, 4, 50, 70, 40), (32, 2, 1, 9, 128)]  # B, H_kv, T, S, D
LINEAR_SHAPES = [(40, 65), (768, 300), (3072, 64)]  # C, N
NORM_SHAPES = [(3, 50, C) for C in (16, 40, 64, 80, 128, 256, 2304)]
PAGE = 16
# Kinds of caches: (dtype, page).
KINDS = {
    "contiguous": (None, None),
    f"pages of {PAGE}": (None, PAGE),
    "int8": (torch.int8, None),
    "fp8": (torch.float8_e4m3fn, None),
    f"int8, pages of {PAGE}": (torch.int8, PAGE),
}


def shares(call, run, packing=None):
    """(name, share of the bound, error) of every result and gradient."""
    for name, actual, yardstick in parity.compare(call, run, packing):
        yield name, *share_of_bound(actual, yardstick)


def with_scale(q, k, v, scale=None, **arguments):
    return ops.Call(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, **arguments)


def attention(feature, dtype, device, implementation, shape):
    B, H, _, T, S, _ = shape
    run = parity.run_triton if implementation == "triton" else parity.run_cpp
    yield from shares(with_scale(*inputs(*shape, dtype, device), **options(feature, B, H, T, S, dtype, device)), run)


def attention_varlen(feature, dtype, device, implementation, shape):
    """Four sequences of such lengths, one of which has no queries, and one fewer keys than queries."""
    _, H, H_kv, T, S, D = shape
    starts = torch.tensor([[0, T, T, 2 * T, 2 * T + 5], [0, S, S + 9, 2 * S + 9, 2 * S + 12]], dtype=torch.int32, device=device)
    packing = ops.Packing(*starts, max(T, 5), max(S, 9))
    totals = starts[:, -1].tolist()
    call = with_scale(*inputs(1, H, H_kv, *totals, D, dtype, device), **options(feature, 1, H, *totals, dtype, device))
    run = parity.run_triton_packed if implementation == "triton" else parity.run_cpp_packed
    yield from shares(call, lambda call, douts: run(call, packing, douts), packing)


def decode(kind, dtype, device, implementation, shape):
    """Few queries over a cache that is not full; every key that must not be read is NaN."""
    cache_dtype, page = KINDS[kind]
    q, k, v = inputs(*shape, dtype, device)
    S = shape[4]
    lengths = torch.tensor([S, S // 2 + 1, 0], dtype=torch.int32, device=device)
    caches = {"k": k, "v": v}
    if cache_dtype is not None:
        (caches["k"], caches["k_scale"]), (caches["v"], caches["v_scale"]) = quantize(k, cache_dtype), quantize(v, cache_dtype)
    for x in caches.values():
        for b, length in enumerate(lengths.tolist() if x.is_floating_point() else ()):
            x[b, :, length:] = torch.nan
    if page is not None:
        caches = {name: paged(x, page) for name, x in caches.items()}
        table = caches["k"][1]
        caches = {name: x for name, (x, _) in caches.items()} | {"block_table": table}
    forward = attention_forward_triton if implementation == "triton" else torch.ops.fastgpt.attention_forward

    def run(call, douts):
        return dict(zip(("out", "lse"), forward(*call)))

    yield from shares(with_scale(q, kv_lengths=lengths, **caches), run)


def kv_cache_update(kind, dtype, device, implementation, shape):
    expected = update_inputs(*shape, dtype, "token-major", *KINDS[kind])
    actual = on(device, expected)
    fastgpt.kv_cache_update(**actual, impl=implementation)
    fastgpt.kv_cache_update_reference(**expected)
    yield "exact", not differing(actual, expected)


def rope_kv_cache_update(kind, dtype, device, implementation, shape):
    """Errors of the rotated queries; rotated keys are checked by `exact`."""
    B, H_kv, T, S, D = shape
    expected = update_inputs(*shape, dtype, "token-major", *KINDS.get(kind, (None, None)))
    rotation = dict(zip(("cos", "sin"), angles(S, D // 4 if kind == "half of the dimensions" else D // 2)))
    rotation["interleaved"] = kind == "interleaved"
    q = torch.randn(B, T, 2 * H_kv, D).transpose(1, 2).to(dtype)
    actual = on(device, expected)
    rotated = fastgpt.rope_kv_cache_update(q.to(device), **actual, **on(device, rotation), impl=implementation).cpu()
    low = fastgpt.rope_kv_cache_update_reference(q, **expected, **rotation)
    yield "exact", torch.equal(rotated, low) and not differing(actual, expected)
    yield "q", *share_of_bound(rotated, lambda: rope_reference(q.double(), expected["positions"], **rotation))


def linear(feature, dtype, device, implementation, shape):
    """Few rows and, except for Triton, many, whose product PyTorch rounds; compared together."""
    rows = (1, 2, 3, 4, 7, 32, *[33] * (implementation != "triton"))
    call = call_of(feature, sum(rows), *shape, dtype)
    actual = torch.cat([fastgpt.linear(**part, impl=implementation) for part in split(there(device, call), rows)])
    yield "out", *share_of_bound(actual, lambda: fastgpt.linear_reference(**in_float64(call)), arithmetic=dtype)


def there(device, call):
    return call if device == "cpu" else on(device, call)  # a copy may have other strides


def norm(feature, dtype, device, implementation, shape):
    call = norm_call(feature, shape, dtype)
    actual = fastgpt.norm(**there(device, call), impl=implementation)
    yield "out", *share_of_bound(actual, lambda: fastgpt.norm_reference(**in_float64(call)))


ATTENTION = {
    attention: (FEATURES, SHAPES),
    attention_varlen: (PACKED_FEATURES, SHAPES),
    decode: (list(KINDS), DECODE_SHAPES),
}
UPDATES = {
    kv_cache_update: (list(KINDS), UPDATE_SHAPES),
    rope_kv_cache_update: ([*KINDS, "interleaved", "half of the dimensions"], UPDATE_SHAPES),
}
DECODER = {linear: (LINEAR_FEATURES, LINEAR_SHAPES), norm: (NORM_FEATURES, NORM_SHAPES)}
OPERATIONS = {"cpp": ATTENTION | UPDATES | DECODER, "triton": ATTENTION | DECODER, "cuda": UPDATES}


def cases(implementation: str, chosen: list[str] | None):
    """Every case of an implementation, as this process can run it."""
    device = "cpu" if implementation == "cpp" or "TRITON_INTERPRET" in os.environ else "cuda"
    where = fastgpt.build_info()["cpu_level"] if implementation == "cpp" else "interpreter"
    where = torch.cuda.get_device_name() if device == "cuda" else where
    for operation, (features, shapes) in OPERATIONS[implementation].items():
        if operation.__name__ not in (chosen or [operation.__name__]):
            continue
        if operation in DECODER and where == "interpreter":  # which these do not choose: the tests call their kernels there
            continue
        for feature in features:
            for dtype in DTYPES:
                torch.manual_seed(0)
                case = {"operation": operation.__name__, "feature": feature, "dtype": str(dtype).removeprefix("torch.")}
                case |= {"implementation": implementation, "on": where}
                for shape in shapes[:-1] if where == "interpreter" else shapes:
                    for name, *values in operation(feature, dtype, device, implementation, shape):
                        add(case, name, *values)
                yield case


def add(case, name, value, error=None):
    """The worst of each name, NaN worse than all."""
    if name == "exact":
        case["exact"] = value and case.get("exact", True)
        return
    for kind, number in (("shares", value), ("errors", error)):
        worst = max(case.setdefault(kind, {}).get(name, 0.0), math.inf if math.isnan(number) else number)
        case[kind][name] = float(f"{worst:.3g}")


def passes(case) -> bool:
    return case.get("exact", True) and all(share <= 1 for share in case.get("shares", {}).values())


def measure(implementation: str, chosen: list[str] | None, environment: dict[str, str]) -> tuple[list[dict], str | None]:
    """The cases of an implementation, measured by another process, and what kept it from measuring all."""
    command = [sys.executable, "-m", "benchmarks.numerics", "--only", implementation]
    command += [word for name in chosen or [] for word in ("--operation", name)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    measured = []
    for line in process.stdout:
        measured.append(case := json.loads(line))
        if not passes(case):
            print("above the bound:", line, end="", flush=True)
        elif len(measured) == 1 or case["operation"] != measured[-2]["operation"]:
            print(f"{implementation}, {case['on']}: {case['operation']}", flush=True)
    return measured, f"its process ended with {process.returncode}" if process.wait() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", action="store_true", help="the C++ kernels at every CPU level")
    parser.add_argument("--operation", action="append", choices=[operation.__name__ for operation in OPERATIONS["cpp"]])
    parser.add_argument("--only", choices=OPERATIONS, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    if args.only:
        for case in cases(args.only, args.operation):
            print(json.dumps(case), flush=True)
        return

    runs = [("cpp", {})]
    runs += [("cpp", {"FASTGPT_CPU_LEVEL": level}) for level in reversed(lower_levels() if args.levels else [])]
    runs += [("triton", {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})] if TRITON_INSTALLED else []
    runs += [("cuda", {})] if torch.cuda.is_available() and not CUDA_MISSING else []
    result, left_out = {}, {}
    for implementation, environment in runs:
        measured, why = measure(implementation, args.operation, environment)
        for case in measured:
            result.setdefault(case.pop("operation"), []).append(case)
        if why is not None:
            left_out[implementation] = why
            print(f"{implementation}: {why}")
    passed = all(passes(case) for of_operation in result.values() for case in of_operation)
    rows = numerics_table.rows(result, by_feature=True)
    print("", aligned(rows, "lll" + "r" * (len(rows[0]) - 3)), "", sep="\n")
    if not args.operation:
        report.store("numerics", result | ({"left_out": left_out} if left_out else {}))
    sys.exit(0 if passed and not left_out else 1)


if __name__ == "__main__":
    main()
