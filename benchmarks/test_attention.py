"""Causal attention over many tokens, forward and with gradients, compared with PyTorch's and other libraries' and with the rate of
a matrix product of its dtype.

q, k and v have the layout of a decoder's projection, token-major, and on a CPU they are warm.
"""

from functools import partial

import pytest
import torch

from benchmarks.attention_peers import check, peers
from benchmarks.timing import DEVICE, DTYPE, arithmetic, full, measured_time, name_of, time_interleaved
from fastgpt import attention, explain
from fastgpt.bench.timing import implementation

pytestmark = pytest.mark.benchmark(timer=measured_time)
B, H = (1, 12) if DEVICE == "cpu" else (4, 16)
WINDOW = 1024
WITH_FLEX = "2,048" if DEVICE == "cpu" else "2,048 or 8,192"
LENGTHS = [128, 512, 2048, 8192] if DEVICE == "cpu" else [1024, 2048, 4096, 8192, 16384]
SLOW_TO_COMPILE = {"FlexAttention": f"it compiles for seconds: in the full set, or with {WITH_FLEX} tokens or a window"}


def cases(*quick, longer_than=0):
    """Cases (T, D, dtype): the quick ones, or in the full set every length, head dim and dtype."""
    if full():
        lengths = [T for T in LENGTHS if T > longer_than]
        quick = [(T, D, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16) for D in (64, 128) for T in lengths]
    ids = [f"{T}tokens-{D}wide-{name_of(dtype)}" for T, D, dtype in quick]
    return pytest.mark.parametrize("T, D, dtype", quick, ids=ids)


def inputs(T, D, dtype, **options):
    torch.manual_seed(0)
    return {name: torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_(**options) for name in "qkv"}


def measure(benchmark, what, example, ours, others, absent, *, flops, **parameters):
    dtype, (T, D) = example["q"].dtype, example["q"].shape[2:]
    time_interleaved(
        benchmark, ours, others, inputs=[example], limit=arithmetic(dtype), flush=True,
        info={
            "what": what, "device": DEVICE, "dtype": name_of(dtype), "batch": B, "heads": H, "head_dim": D, "T": T,
            **parameters, "flops": flops, "implementation": implementation(explain(attention, **example)), "absent": absent,
        },
    )  # fmt: skip


if DEVICE == "cpu":
    QUICK = [*((T, 64, DTYPE) for T in LENGTHS), (2048, 64, torch.float16), (2048, 64, torch.bfloat16)]
else:  # the most telling first: time may run out
    QUICK = [(T, D, DTYPE) for T in (8192, 2048, 16384, 4096, 1024) for D in (128, 64)]


@cases(*QUICK)
@torch.inference_mode()
def test_prefill(benchmark, T, D, dtype):
    example = inputs(T, D, dtype, requires_grad=False)
    check(attention(**example), **example)
    left_out = not full() and (T not in (2048, 8192) if DEVICE == "cuda" else (T, dtype) != (2048, torch.float32))
    others, absent = peers(attention, example, without=SLOW_TO_COMPILE if left_out else None)
    measure(benchmark, "prefill", example, attention, others, absent, flops=2 * B * H * T * T * D)


@cases((2048, 64, DTYPE), *[(8192, D, DTYPE) for D in (64, 128) if DEVICE == "cuda"])
def test_forward_and_backward(benchmark, T, D, dtype):
    """The FLOPs of the backward pass are 2.5 times those of the forward pass."""
    example = inputs(T, D, dtype)
    dout = torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2)

    def gradients(function):
        return lambda **x: torch.autograd.grad(function(**x), list(x.values()), dout)

    ours = gradients(attention)
    others, absent = peers(ours, example, of=gradients)
    assert others, f"nothing to compare gradients with: {absent}"
    measure(benchmark, "forward and backward", example, ours, others, absent, flops=7 * B * H * T * T * D)


@cases((4096 if DEVICE == "cpu" else 16384, 64, DTYPE), longer_than=WINDOW)
@torch.inference_mode()
def test_window(benchmark, T, D, dtype):
    example = inputs(T, D, dtype, requires_grad=False)
    ours = partial(attention, window=WINDOW)
    check(ours(**example), window=WINDOW, **example)
    others, absent = peers(ours, example, window=WINDOW)
    pairs = WINDOW * (WINDOW + 1) // 2 + (T - WINDOW) * WINDOW
    measure(benchmark, "window", example, ours, others, absent, flops=4 * B * H * pairs * D, window=WINDOW)
