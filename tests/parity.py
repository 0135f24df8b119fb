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

from attention_features import FEATURES, in_double, inputs, options  # noqa: E402
from numerics import BACKWARD, FORWARD, share_of_bound  # noqa: E402

from fastgpt.ops import attention as ops  # noqa: E402

SHAPES = [(2, 4, 2, 37, 70, 40), (2, 6, 2, 5, 33, 64), (1, 6, 3, 40, 21, 16)]  # B, H, H_kv, T, S, D
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def worst_shares(implementation: str, device: str) -> dict:
    """feature -> dtype -> {"out", "lse", and of kernels with a backward "dq", "dk", "dv", "dbias", "dsinks"} -> share."""
    result = {}
    for feature in FEATURES:
        for dtype in DTYPES:
            shares = {}
            for shape in SHAPES:
                B, H, _, T, S, D = shape
                call = ops.Call(*inputs(*shape, dtype, device), **options(feature, B, H, T, S, dtype, device))
                call = call._replace(scale=D**-0.5 if call.scale is None else call.scale)
                if implementation == "cpp" and ops.IMPLEMENTATIONS["cpp"](call):
                    continue
                for name, share in shares_of(call, implementation).items():
                    shares[name] = max(share, shares.get(name, 0.0))
            if shares:
                result.setdefault(feature, {})[str(dtype).removeprefix("torch.")] = shares
    return result


def reference(call, douts=None):
    """out, lse, and the gradients by what is differentiable."""
    leaves = {name: getattr(call, name) for name in ("q", "k", "v", "bias", "sinks")}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
    out, lse = ops.attention_reference(**call._replace(**leaves)._asdict(), return_lse=True)
    if douts is None:
        return {"out": out, "lse": lse}
    torch.autograd.backward((out, lse), tuple(dout.to(x.dtype) for dout, x in zip(douts, (out, lse))))
    return {"out": out, "lse": lse} | {f"d{name}": x.grad for name, x in leaves.items()}


def shares_of(call, implementation) -> dict[str, float]:
    doubled = call._replace(**{name: getattr(call, name).double() for name in ("q", "k", "v")})
    doubled = doubled._replace(**in_double({"bias": call.bias, "sinks": call.sinks}))
    if implementation == "cpp":
        actual = dict(zip(("out", "lse"), torch.ops.fastgpt.attention_forward(*call)))
        douts = None
    else:
        from fastgpt.kernels.attention_backward import attention_backward
        from fastgpt.kernels.attention_forward import attention_forward

        arguments = call._asdict()
        q, k, v = (arguments.pop(name) for name in "qkv")
        out, lse = attention_forward(q, k, v, **arguments)
        douts = torch.randn_like(q), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
        for name in ("block_table", "k_scale", "v_scale"):
            del arguments[name]
        needed = {"needs_dbias": call.bias is not None}
        gradients = attention_backward(*douts, q, k, v, out, lse, **arguments, **needed)
        actual = {"out": out, "lse": lse}
        actual |= {f"d{name}": x for name, x in zip(("q", "k", "v", "bias", "sinks"), gradients) if x is not None}
    oracle, low = reference(doubled, douts), reference(call, douts)
    return {
        name: share_of_bound(
            x, oracle[name], low[name], dtype=x.dtype, k=BACKWARD if name.startswith("d") else FORWARD
        )[0]
        for name, x in actual.items()
    }


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
