"""Compiles what benchmarks will launch before they launch it, on all cores: their time on a GPU is for timing.

python -m benchmarks.compile_ahead [SUITE ...] [--arch N] [--share I/N] [--workers N]

Which kernels these are, a GPU that is not there tells (tests/fake_gpu.py): the suites' models and shapes go through Triton's
own path to a launch, once. What is compiled lies in Triton's cache, where the launch finds it. --arch is that of the GPU at
hand, and must be given where there is none.
"""

import argparse
import dataclasses
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # whose GPU it is that is not there

from cuda_stub import on_fake_cuda  # noqa: E402
from fake_gpu import Launch, gpu  # noqa: E402

import fastgpt  # noqa: E402
from benchmarks import decoding, peers  # noqa: E402

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def empty(*shape, dtype=BF16, **options) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, **options)


def model_of(config: fastgpt.GPTConfig) -> fastgpt.GPT:
    """With two layers: of the last one's prompt the last token alone attends, and all before it are alike."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = fastgpt.GPT(dataclasses.replace(config, num_layers=2)).eval()
    return on_fake_cuda(model, BF16)


SHIPPED = fastgpt.GPTConfig(65, context_length=512, num_layers=6, num_heads=3, hidden_size=192)
GENERATED = [  # config, prompts, their tokens, options
    *((decoding.SHAPES[name], 1, T, {"num_samples": batch}) for name, batch, T in decoding.CASES),
    *(
        (config, batch, 100, options)
        for config in (decoding.SHAPES["gpt2-124m"], peers.LLAMA, SHIPPED)
        for batch, options in ((1, {}), (8, {}), (1, {"use_cache": False}))
    ),
]


def generate(config, batch, T, options) -> None:
    """Greedily: to draw a token is PyTorch's."""
    fastgpt.generate(model_of(config), empty(batch, T, dtype=torch.int64), 3, **options)


def attention() -> None:
    for D in (64, 128):
        q = empty(4, 4096, 16, D).transpose(1, 2).requires_grad_()
        for options in ({}, {"window": 1024}):
            with torch.no_grad():
                fastgpt.attention(q, q, q, **options)
            with torch.enable_grad():
                fastgpt.attention(q, q, q, **options).sum().backward()


def decode() -> None:
    for dtype, (H, H_kv, D), B in [
        *((BF16, heads, B) for heads in ((12, 12, 64), (32, 4, 128)) for B in (1, 16)), (torch.float16, (12, 12, 64), 1),
        *((dtype, heads, 1) for dtype in (INT8, FP8) for heads in ((12, 12, 64), (32, 4, 128))),
    ]:  # fmt: skip
        of_q = BF16 if dtype.itemsize == 1 else dtype
        k, v, new = (empty(B, H_kv, 8192, D, dtype=dtype) for _ in range(3))
        q, token, positions = empty(B, H, 1, D, dtype=of_q), empty(B, H_kv, 1, D, dtype=of_q), empty(B, 1, dtype=torch.int32)
        scales = {name: empty(B, H_kv, 8192, dtype=torch.float32) for name in ("k_scale", "v_scale")}
        scales = scales if dtype.itemsize == 1 else {}
        angles, lengths = empty(8192, D // 2, dtype=torch.float32), empty(B, dtype=torch.int32)
        fastgpt.attention(q, k, v, **scales)
        fastgpt.attention(q, k, v, kv_lengths=lengths, **scales)
        for rotation in ((), (angles, angles)):
            fastgpt.attention_with_kv_cache(q, token, token, k, v, positions, *rotation, kv_lengths=lengths, **scales)
    pages, table = empty(512, 12, 16, 64), empty(1, 512, dtype=torch.int32)
    fastgpt.attention(empty(1, 12, 1, 64), pages, pages, block_table=table)


def linear() -> None:
    from benchmarks.shipped_kernels import PRODUCTS

    for rows, K, activation, gated, given in PRODUCTS:
        names = {"bias_ptr": ("bias", (rows,)), "norm_weight_ptr": ("norm_weight", (K,)), "norm_bias_ptr": ("norm_bias", (K,))}
        tensors = {name: empty(*size) for pointer, (name, size) in names.items() if pointer in given}
        activation = {0: None, 1: "gelu_tanh", 3: "silu"}[activation]
        norm = "layer" if "norm_bias" in tensors else "rms"
        for x_rows in (1, 8):
            residual = {"residual": empty(x_rows, rows)} if "residual_ptr" in given else {}
            options = tensors | residual | {"activation": activation, "gated": gated, "norm": norm}
            fastgpt.linear(empty(x_rows, K), empty(rows, K), **options)
    for rows in (1, 512):
        experts, weights = fastgpt.route(empty(rows, 64, dtype=torch.float32), 8, normalize=True)
        fastgpt.moe(empty(rows, 2048), experts, weights, empty(64, 2 * 768, 2048), empty(64, 2048, 768))


SUITES = {  # a function, and each of its calls' arguments
    "generate": (generate, GENERATED), "attention": (attention, [()]), "decode": (decode, [()]), "linear": (linear, [()]),
}  # fmt: skip


def launched(arch: int, suite: str, number: int) -> dict[tuple, tuple]:
    """The kernels that a call of a suite launches: (kernel, variant) -> arguments of `compiled`."""
    function, calls = SUITES[suite]
    with gpu(arch) as device, torch.device("cuda:0"), torch.no_grad():
        function(*calls[number])
    events = device.events + [event for capture in device.captures for event in capture]
    return {(x.kernel, x.variant): (*x.source, x.options) for x in events if isinstance(x, Launch)}


def compiled(arch: int, module: str, name: str, signature: dict, constants: dict, attributes: dict, options: dict) -> float:
    """Leaves a kernel in Triton's cache. Returns the seconds of this process's CPU that it took, its children's included."""
    start = sum(os.times()[:4])
    source = ASTSource(getattr(import_module(module), name), signature, constants, attributes)
    triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return sum(os.times()[:4]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--arch", type=int, help="80, 89, 90, 100 or 120")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every N-th kernel from the I-th on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if unknown := set(args.suites) - SUITES.keys():
        parser.error(f"SUITE: expected {', '.join(SUITES)}, got {', '.join(unknown)}")
    if args.arch is None:
        major, minor = torch.cuda.get_device_capability()
        args.arch = 10 * major + minor
    first, step = map(int, args.share.split("/"))
    done, start, suites = set(), time.perf_counter(), args.suites or list(SUITES)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        listing = {
            suite: [pool.submit(launched, args.arch, suite, i) for i in range(len(SUITES[suite][1]))] for suite in suites
        }
        waiting = []
        for suite, lists in listing.items():
            found = {key: sources for listed in lists for key, sources in listed.result().items()}
            new = {key: sources for key, sources in found.items() if key not in done}
            done |= new.keys()
            chosen = list(new.values())[first - 1 :: step]
            waiting.append((suite, len(new), [pool.submit(compiled, args.arch, *sources) for sources in chosen]))
        for suite, count, results in waiting:
            seconds, faults = 0.0, 0
            for result in results:
                try:
                    seconds += result.result()
                except Exception as error:  # the others are compiled
                    faults += 1
                    print(f"{suite}: {type(error).__name__}: {error}"[:500])
            print(f"{suite}: {count} kernels, {len(results) - faults} compiled in {seconds:.0f} s of CPU", flush=True)
    print(f"{time.perf_counter() - start:.0f} s with {args.workers} workers")


if __name__ == "__main__":
    main()
