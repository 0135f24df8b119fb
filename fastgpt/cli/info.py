"""`fastgpt info`: versions, devices, and which implementation each operation uses, and why."""

import argparse
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import fastgpt
from fastgpt.bench.timing import implementation
from fastgpt.cli.example_calls import example_calls
from fastgpt.generation.decoding import decoding
from fastgpt.ops.library import CUDA_MISSING

OPERATIONS: dict[Callable, str] = {  # what they compute
    fastgpt.attention: "softmax attention over keys and values, with its gradients",
    fastgpt.attention_varlen: "attention of sequences of different lengths, packed without padding",
    fastgpt.attention_with_kv_cache: "rotary embedding, storing into a cache, and attention over that cache",
    fastgpt.kv_cache_update: "storing keys and values into a cache",
    fastgpt.rope_kv_cache_update: "rotary embedding of queries and keys, and storing keys and values into a cache",
    fastgpt.linear: "product with a weight, with norm, activation, gate and residual; here of one row",
    fastgpt.norm: "layer norm or RMS norm, with the residual added",
    fastgpt.scaled_dot_product_attention: "attention as PyTorch's function of this name defines it",
    decoding: "a decoder's whole step from a token to the next logits",
}
IMPLEMENTATIONS = {
    "cpp": "a compiled C++ kernel, for CPUs",
    "cuda": "a compiled CUDA C++ kernel",
    "triton": "a Triton kernel, compiled for the GPU at its first use",
    "reference": "plain PyTorch, on every device",
    "unfused": "rope_kv_cache_update, then attention, each by the implementation that serves it",
    "torch": "PyTorch's own function",
    "cuda_graph": "captured in a CUDA graph once, and launched as a whole at every step",
    "cpu_replay": "its operations are recorded once, and called without Python at every step",
    "eager": "the model's modules are called from Python at every step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints versions, devices, and which implementation each operation uses, and why."


def run(options: argparse.Namespace) -> None:
    print_versions()
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    names: set[str] = set()
    for device in devices:
        for operation, arguments in example_calls(device).items():
            reasons = fastgpt.explain(operation, *arguments)
            chosen = implementation(reasons)
            print(f"\n{operation.__qualname__} on {device}: {chosen}\n    {OPERATIONS[operation]}")
            for name, reason in reasons.items():
                if name != chosen:
                    print(f"    not {name}: {f'{chosen} comes first' if reason == 'available' else reason}")
            names |= reasons.keys()
    print()
    for name, meaning in IMPLEMENTATIONS.items():
        if name in names:
            print(f"{name}: {meaning}")


def print_versions() -> None:
    build = fastgpt.build_info()
    cuda = "CUDA " + torch.version.cuda if torch.version.cuda else "a CPU build"
    triton = installed_version("triton") or "not installed"
    print(f"fastgpt {fastgpt.__version__}: {Path(fastgpt.__file__).parent}")
    print(f"Python {platform.python_version()}, torch {torch.__version__} ({cuda}), triton {triton}")
    print(f"compiled by {build['compiler']} for torch >= {build['torch_target_version']}")
    print(f"CPU: {build['cpu_level']} in use, compiled: {', '.join(build['cpu_levels'])}; {torch.get_num_threads()} threads")
    archs = ", ".join(build["cuda_archs"])
    library = "not built (no working nvcc was found, or it was left out)"
    if archs:
        library = f"built for {archs} by CUDA {build['cuda_version']}"
    print(f"CUDA library: {library}" + (f"; not loaded: {CUDA_MISSING}" if archs and CUDA_MISSING else ""))


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
