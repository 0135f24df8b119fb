"""`fastgpt info`: versions, devices, and which implementation each operation uses, and why; or what is in a model."""

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.bench.timing import implementation
from fastgpt.checkpoints import gguf_architectures, gguf_config, gguf_file, gguf_tensors, quantized_folders, transformers_format
from fastgpt.checkpoints.families import HEADS
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.files import CONFIG, TOKENIZER, read_json
from fastgpt.checkpoints.safetensors_files import headers, weight_files
from fastgpt.cli.arguments import path
from fastgpt.cli.example_calls import example_calls
from fastgpt.encoding.sentences import read_sentences
from fastgpt.generation.decoding import decoding
from fastgpt.model import classifiers
from fastgpt.ops.library import CUDA_MISSING
from fastgpt.schema import read

OPERATIONS: dict[Callable, str] = {  # what they compute
    fastgpt.attention: "softmax attention over keys and values, with its gradients",
    fastgpt.attention_varlen: "attention of sequences of different lengths, packed without padding",
    fastgpt.attention_with_kv_cache: "rotary embedding, storing into a cache, and attention over that cache",
    fastgpt.kv_cache_update: "storing keys and values into a cache",
    fastgpt.rope_kv_cache_update: "rotary embedding of queries and keys, and storing keys and values into a cache",
    fastgpt.linear: "product with a weight, with norm, activation, gate and residual; here of one row",
    fastgpt.route: "the choice of experts for each token in a mixture of experts, and their weights",
    fastgpt.moe: "the MLPs of the experts that each token was routed to, weighted and summed",
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
TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1}  # types in safetensors files of what is served
TOKENIZER_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.pre")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints versions, devices, and which implementation each operation uses, and why. With a model: its contents."
    )
    parser.add_argument("source", nargs="?", type=path, metavar="MODEL", help="a checkpoint folder, or a GGUF file; of a model in "
        "several, any of them")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    if options.source is not None:
        if not options.source.exists():
            raise FileNotFoundError(f"model: expected a checkpoint folder or a GGUF file, {options.source} does not exist")
        print_folder(options.source) if options.source.is_dir() else print_file(options.source)
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


def print_file(model: Path) -> None:
    """Prints what a GGUF file, or all files of a model that was split, have in them."""
    file = gguf_file.read(model)
    metadata, architecture = file.metadata, file.architecture
    weights = [tensor for tensor in file.tensors.values() if tensor.name not in gguf_config.ROPE_TENSORS]
    tokens = metadata.get("tokenizer.ggml.tokens")
    served = "" if architecture in gguf_architectures.ARCHITECTURES else ", which is not served"
    print_lines({
        "architecture": one_line(architecture) + served,
        "name": one_line(metadata.get("general.name", "none")),
        "parameters": f"{sum(tensor.numel for tensor in weights):,}",
        "size": size_of(file.paths),
        "context": one_line(metadata.get(f"{architecture}.context_length", "not said")),
        "vocabulary": f"{len(tokens):,} tokens" if isinstance(tokens, list) else "none",
        "tokenizer": ", ".join(one_line(metadata[key]) for key in TOKENIZER_KEYS if key in metadata) or "none",
        "chat template": "yes" if "tokenizer.chat_template" in metadata else "no",
    })  # fmt: skip
    print_types([(tensor.type, tensor.nbytes) for tensor in file.tensors.values()], gguf_tensors.SERVED)


def print_folder(folder: Path) -> None:
    """Prints what a checkpoint folder has in it, also one that is not served."""
    from fastgpt.text.tokenizer_files import read_chat_templates  # loads the package tokenizers
    from fastgpt.text.vocabularies import read_json as read_tokenizer_json

    fields, scheme, served, family = {}, None, "", None  # type: dict, quantized_folders.Scheme | None, str, Family | None
    head = head_of(folder)
    try:
        family, config, parts = transformers_format.read_config(folder, head)
        _, fields = family.parts(parts)[0]
        scheme = quantized_folders.scheme(config)
    except ValueError as error:
        config, served = read_json(folder / CONFIG), f", which is not served: {error}"
    files = weight_files(folder)
    found, metadata = headers(files)
    if family is not None:  # without buffers, such as position_ids, which are not loaded
        found = [part for part in found if family.with_prefix(part.name) is not None]
    weights = found if scheme is None else quantized_folders.matrices(found, scheme, metadata)
    tokenizers = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    print_lines({
        "architecture": one_line(config.get("model_type", "not said")) + served,
        "name": one_line(folder.absolute().name),
        "parameters": f"{sum(weight.numel for weight in weights):,}",
        "size": size_of(files),
        **experts_line(fields),
        **({} if family is None else uses(folder, family, head, config, {part.name for part in found})),
        "context": one_line(fields.get("context_length", config.get("max_position_embeddings", "not said"))),
        "vocabulary": one_line(config.get("vocab_size", "no")) + " tokens",
        "tokenizer": ", ".join(tokenizers) or "none",
        "chat template": "no" if read_chat_templates(folder, read_tokenizer_json(folder, "tokenizer_config.json")) is None else "yes",
        "quantization": "none" if scheme is None else scheme.method,
    })  # fmt: skip
    print_types([(weight.dtype, weight.numel * BYTES.get(weight.dtype, 1)) for weight in found], BYTES)


def head_of(folder: Path) -> str | None:
    """The one of HEADS that a checkpoint's config.json names, or None."""
    try:
        named = read_json(folder / CONFIG).get("architectures")
    except (OSError, ValueError):  # which read_config reports
        return None
    return (
        next((head for head in HEADS for name in named or () if str(name).endswith(head)), None)
        if isinstance(named, list)
        else None
    )


def uses(folder: Path, family: Family, head: str | None, config: dict, names: set[str]) -> dict[str, str]:
    """What loads the checkpoint of an encoder, an encoder-decoder or a classifier, and what it can do.

    Args:
        names: of its weights.
    """
    if head is not None:
        settings = read(classifiers.Classifier.schema, config)
        labels = classifiers.labels_of(settings["id2label"]) or range(settings["num_labels"])
        listed = ", ".join(map(one_line, labels.values())) if isinstance(labels, dict) else "without names"
        return {"loaded by": f"fastgpt.{HEADS[head]}.from_pretrained", "labels": one_line(f"{len(labels)}: {listed}")}
    if not family.encoder:
        return {"loaded by": "fastgpt.pipeline, fastgpt.EncoderDecoder.from_pretrained"} if family.stacks else {}
    try:
        own = read_sentences(folder)
    except (OSError, ValueError) as error:
        embeds = f"no: {error}"
    else:
        what = {"mean": "the mean of all tokens", "first": "the first token"}[own.pooling]
        embeds = what + (", normalized" if own.normalize else "")
        embeds += f", of at most {own.max_tokens:,} tokens" if own.max_tokens else ""
        if own.prompts:
            default = "" if own.default_prompt_name is None else f" (default {own.default_prompt_name})"
            embeds += f"; prompts {', '.join(map(one_line, own.prompts))}{default}"
    given, head_name = {family.with_prefix(name) for name in names}, "head.transform.dense"
    has_head = head_name in family.names and not given.isdisjoint(family.checkpoint_names(f"{head_name}.weight")[0])
    return {
        "loaded by": "fastgpt.pipeline, fastgpt.Encoder.from_pretrained",
        "embed": embeds,
        "fill": "words for masked tokens" if has_head else "no: there is no masked-language head",
    }


def experts_line(fields: dict) -> dict[str, str]:
    """Of a mixture of experts, by GPTConfig's fields."""
    if not fields.get("num_experts"):
        return {}
    shared = ", and a shared one" if fields.get("shared_expert_size") else ""
    return {"experts": f"{fields['num_experts']} in a layer, {fields['experts_per_token']} for each token{shared}"}


def print_lines(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        print(f"{name + ':':15}{value}")


def print_types(tensors: list[tuple[str, int]], served: Collection[str]) -> None:
    """Prints how many tensors and bytes there are of each type.

    Args:
        tensors: type and bytes of each.
    """
    types: dict[str, list[int]] = defaultdict(list)
    for name, count in tensors:
        types[name].append(count)
    print(f"\n{'type':8}  tensors       bytes")
    for name, counts in sorted(types.items(), key=lambda entry: -sum(entry[1])):
        print(f"{name:8}  {len(counts):>7,}  {megabytes(sum(counts)):>10}{'' if name in served else '  not served'}")


def size_of(files: Collection[Path]) -> str:
    return megabytes(sum(file.stat().st_size for file in files)) + (f" in {len(files)} files" if len(files) > 1 else "")


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
