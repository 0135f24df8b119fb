"""`fastgpt info`: versions, devices, and which implementation each operation uses, and why; or what is in a GGUF file."""

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.bench.timing import implementation
from fastgpt.checkpoints import gguf, gguf_file
from fastgpt.cli.arguments import path
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
TOKENIZER_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.pre")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints versions, devices, and which implementation each operation uses, and why. With a GGUF file: its contents."
    )
    parser.add_argument("file", nargs="?", type=path, metavar="FILE", help="a GGUF file; of a model in several, any of them")


def run(options: argparse.Namespace) -> None:
    if options.file is not None:
        print_contents(options.file)
        return
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


def print_contents(model: Path) -> None:
    """Prints what a GGUF file, or all files of a model that was split, have in them."""
    if model.is_dir():
        raise ValueError(f"file: expected a GGUF file, got the folder {model}")
    file = gguf_file.read(model)
    metadata, architecture = file.metadata, file.architecture
    weights = [tensor for tensor in file.tensors.values() if tensor.name not in gguf.ROPE_TENSORS]
    types: dict[str, list] = defaultdict(list)
    for tensor in file.tensors.values():
        types[tensor.type].append(tensor)
    size = sum(part.stat().st_size for part in file.paths)
    tokens = metadata.get("tokenizer.ggml.tokens")
    served = "" if architecture in gguf.ARCHITECTURES else ", which is not served"
    lines = {
        "architecture": one_line(architecture) + served,
        "name": one_line(metadata.get("general.name", "none")),
        "parameters": f"{sum(tensor.numel for tensor in weights):,}",
        "size": megabytes(size) + (f" in {len(file.paths)} files" if len(file.paths) > 1 else ""),
        "context": one_line(metadata.get(f"{architecture}.context_length", "not said")),
        "vocabulary": f"{len(tokens):,} tokens" if isinstance(tokens, list) else "none",
        "tokenizer": ", ".join(one_line(metadata[key]) for key in TOKENIZER_KEYS if key in metadata) or "none",
        "chat template": "yes" if "tokenizer.chat_template" in metadata else "no",
    }
    for name, value in lines.items():
        print(f"{name + ':':15}{value}")
    print(f"\n{'type':8}  tensors       bytes")
    for name, found in sorted(types.items(), key=lambda entry: -sum(tensor.nbytes for tensor in entry[1])):
        not_served = "" if name in gguf.SERVED else "  not served"
        print(f"{name:8}  {len(found):>7,}  {megabytes(sum(tensor.nbytes for tensor in found)):>10}{not_served}")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def one_line(value: Any) -> str:
    """A value of a file as it can be shown in a terminal."""
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)[:100]
    return text if text.isprintable() else repr(text)[1:-1]


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
        return version(package)
    except PackageNotFoundError:
        return None
