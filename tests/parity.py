"""The table of parity: for each feature of attention and dtype, the worst error as a share of what the contract allows.

python tests/parity.py     writes benchmarks/results/<machine>/parity.json

The Triton kernels run on the GPU, or without one in Triton's interpreter, in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attention_features import FEATURES, inputs, options  # noqa: E402
from attention_parity import compare, run_cpp, run_triton  # noqa: E402
from numerics import share_of_bound  # noqa: E402

from fastgpt.ops import attention as ops  # noqa: E402

SHAPES = [(2, 4, 2, 37, 70, 40), (2, 3, 1, 3, 33, 64), (1, 2, 2, 40, 21, 16)]  # B, H, H_kv, T, S, D
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def worst_shares(implementation: str, device: str) -> dict:
    """feature -> dtype -> {"out", "lse", "dq", "dk", "dv", and where they exist "dbias", "dsinks"} -> share."""
    result = {}
    for feature in FEATURES:
        for dtype in DTYPES:
            shares = {}
            for shape in SHAPES:
                B, H, _, T, S, D = shape
                call = ops.Call(*inputs(*shape, dtype, device), **options(feature, B, H, T, S, dtype, device))
                call = call._replace(scale=D**-0.5 if call.scale is None else call.scale)
                for name, share in shares_of(call, implementation).items():
                    shares[name] = max(share, shares.get(name, 0.0))
            result.setdefault(feature, {})[str(dtype).removeprefix("torch.")] = shares
    return result


def shares_of(call, implementation) -> dict[str, float]:
    run = run_triton if implementation == "triton" else run_cpp
    compared = compare(call, run)
    return {name: share_of_bound(*tensors, dtype=tensors[0].dtype, k=k)[0] for name, *tensors, k in compared}


def main() -> None:
    if len(sys.argv) > 1:  # the process for Triton
        print(json.dumps(worst_shares("triton", sys.argv[1])))
        return
    from benchmarks.report import store

    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    run = subprocess.run([sys.executable, __file__, device], env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    how = "on the GPU" if device == "cuda" else "in the interpreter"
    store("parity", {"C++": worst_shares("cpp", "cpu"), f"Triton, {how}": json.loads(run.stdout.splitlines()[-1])})


if __name__ == "__main__":
    main()
