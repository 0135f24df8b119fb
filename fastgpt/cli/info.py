"""`fastgpt info`: versions, devices, and which implementation each operation uses, and why; or what is in a model."""

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict
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
from fastgpt.encoding.sentences import Sentences, read_sentences
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
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")


def run(options: argparse.Namespace) -> None:
    if options.source is None:
        facts, show = machine_facts(), print_machine
    elif options.source.exists():
        facts, show = model_facts(options.source), print_model
    else:
        raise FileNotFoundError(f"model: expected a checkpoint folder or a GGUF file, {options.source} does not exist")
    print(json.dumps(facts)) if options.json else show(facts)


def machine_facts() -> dict:
    """Versions, devices, and the implementation of each operation on each device."""
    gpus = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    operations = []
    for device in ("cpu", *gpus):
        for operation, arguments in example_calls(torch.device(device)).items():
            reasons = fastgpt.explain(operation, *arguments)
            operations.append({
                "operation": operation.__qualname__, "computes": OPERATIONS[operation], "device": device,
                "implementation": implementation(reasons), "explanation": reasons,
            })  # fmt: skip
    names = {name for entry in operations for name in entry["explanation"]}
    return {
        "fastgpt": fastgpt.__version__,
        "folder": str(Path(fastgpt.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "threads": torch.get_num_threads(),
        "build": fastgpt.build_info(),
        "cuda_library_missing": CUDA_MISSING,
        "gpus": gpus,
        "operations": operations,
        "implementations": {name: meaning for name, meaning in IMPLEMENTATIONS.items() if name in names},
    }


def print_machine(facts: dict) -> None:
    build = facts["build"]
    cuda = f"CUDA {facts['cuda']}" if facts["cuda"] else "a CPU build"
    print(f"fastgpt {facts['fastgpt']}: {facts['folder']}")
    print(f"Python {facts['python']}, torch {facts['torch']} ({cuda}), triton {facts['triton'] or 'not installed'}")
    print(f"compiled by {build['compiler']} for torch >= {build['torch_target_version']}")
    print(f"CPU: {build['cpu_level']} in use, compiled: {', '.join(build['cpu_levels'])}; {facts['threads']} threads")
    archs, missing = ", ".join(build["cuda_archs"]), facts["cuda_library_missing"]
    library = "not built (no working nvcc was found, or it was left out)"
    if archs:
        library = f"built for {archs} by CUDA {build['cuda_version']}"
    print(f"CUDA library: {library}" + (f"; not loaded: {missing}" if archs and missing else ""))
    for device, name in facts["gpus"].items():
        print(f"{device}: {name}")
    for entry in facts["operations"]:
        chosen = entry["implementation"]
        print(f"\n{entry['operation']} on {entry['device']}: {chosen}\n    {entry['computes']}")
        for name, reason in entry["explanation"].items():
            if name != chosen:
                print(f"    not {name}: {f'{chosen} comes first' if reason == 'available' else reason}")
    print()
    for name, meaning in facts["implementations"].items():
        print(f"{name}: {meaning}")


def model_facts(model: Path) -> dict:
    """What a checkpoint folder or a GGUF file has in it, also one that is not served. None is what it does not say."""
    return folder_facts(model) if model.is_dir() else file_facts(model)


def file_facts(model: Path) -> dict:
    """Of a GGUF file, or all files of a model that was split."""
    file = gguf_file.read(model)
    metadata, architecture = file.metadata, file.architecture
    weights = [tensor for tensor in file.tensors.values() if tensor.name not in gguf_config.ROPE_TENSORS]
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "architecture": architecture,
        "served": architecture in gguf_architectures.ARCHITECTURES,
        "name": metadata.get("general.name"),
        "parameters": sum(tensor.numel for tensor in weights),
        **sizes(file.paths),
        "context_length": metadata.get(f"{architecture}.context_length"),
        "vocab_size": len(tokens) if isinstance(tokens, list) else None,
        "tokenizer": [metadata[key] for key in TOKENIZER_KEYS if key in metadata],
        "chat_template": "tokenizer.chat_template" in metadata,
        "types": types([(tensor.type, tensor.nbytes) for tensor in file.tensors.values()], gguf_tensors.SERVED),
    }


def folder_facts(folder: Path) -> dict:
    from fastgpt.text.tokenizer_files import read_chat_templates  # loads the package tokenizers
    from fastgpt.text.vocabularies import read_json as read_tokenizer_json

    fields, scheme, refused, family = {}, None, None, None  # type: dict, quantized_folders.Scheme | None, str | None, Family | None
    head = head_of(folder)
    try:
        family, config, parts = transformers_format.read_config(folder, head)
        _, fields = family.parts(parts)[0]
        scheme = quantized_folders.scheme(config)
    except ValueError as error:
        config, refused = read_json(folder / CONFIG), str(error)
    files = weight_files(folder)
    found, metadata = headers(files)
    if family is not None:  # without buffers, such as position_ids, which are not loaded
        found = [part for part in found if family.with_prefix(part.name) is not None]
    weights = found if scheme is None else quantized_folders.matrices(found, scheme, metadata)
    return {
        "architecture": config.get("model_type"),
        "served": refused is None,
        **({} if refused is None else {"reason": refused}),
        "name": folder.absolute().name,
        "parameters": sum(weight.numel for weight in weights),
        **sizes(files),
        **experts(fields),
        **({} if family is None else uses(folder, family, head, config, {part.name for part in found})),
        "context_length": fields.get("context_length", config.get("max_position_embeddings")),
        "vocab_size": config.get("vocab_size"),
        "tokenizer": [name for name in TOKENIZER_FILES if (folder / name).is_file()],
        "chat_template": read_chat_templates(folder, read_tokenizer_json(folder, "tokenizer_config.json")) is not None,
        "quantization": None if scheme is None else scheme.method,
        "types": types([(weight.dtype, weight.numel * BYTES.get(weight.dtype, 1)) for weight in found], BYTES),
    }


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


def uses(folder: Path, family: Family, head: str | None, config: dict, names: set[str]) -> dict[str, Any]:
    """What loads the checkpoint of an encoder, an encoder-decoder or a classifier, and what it can do.

    Args:
        names: of its weights.
    """
    if head is not None:
        settings = read(classifiers.Classifier.schema, config)
        labels = classifiers.labels_of(settings["id2label"])
        return {
            "loaded_by": [f"fastgpt.{HEADS[head]}.from_pretrained"],
            "num_labels": settings["num_labels"] if labels is None else len(labels),
            "labels": labels and list(labels.values()),
        }
    if not family.encoder:
        return {"loaded_by": ["fastgpt.pipeline", "fastgpt.EncoderDecoder.from_pretrained"]} if family.stacks else {}
    try:
        embed = asdict(read_sentences(folder))
    except (OSError, ValueError) as error:
        embed = {"error": str(error)}
    given, head_name = {family.with_prefix(name) for name in names}, "head.transform.dense"
    has_head = head_name in family.names and not given.isdisjoint(family.checkpoint_names(f"{head_name}.weight")[0])
    return {"loaded_by": ["fastgpt.pipeline", "fastgpt.Encoder.from_pretrained"], "embed": embed, "fill": has_head}


def experts(fields: dict) -> dict:
    """Of a mixture of experts, by GPTConfig's fields."""
    names = ("num_experts", "experts_per_token", "shared_expert_size")
    return {name: fields.get(name, 0) for name in names} if fields.get("num_experts") else {}


def sizes(files: Collection[Path]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def types(tensors: list[tuple[str, int]], served: Collection[str]) -> dict[str, dict]:
    """How many tensors and bytes there are of each type, most bytes first.

    Args:
        tensors: type and bytes of each.
    """
    counts: dict[str, list[int]] = defaultdict(list)
    for name, count in tensors:
        counts[name].append(count)
    return {
        name: {"tensors": len(found), "bytes": sum(found), "served": name in served}
        for name, found in sorted(counts.items(), key=lambda entry: -sum(entry[1]))
    }


def print_model(facts: dict) -> None:
    for name, value in model_lines(facts).items():
        print(f"{name + ':':15}{value}")
    print(f"\n{'type':8}  tensors       bytes")
    for name, found in facts["types"].items():
        served = "" if found["served"] else "  not served"
        print(f"{name:8}  {found['tensors']:>7,}  {megabytes(found['bytes']):>10}{served}")


def model_lines(facts: dict) -> dict[str, str]:
    """The facts of a model, but those of its types, as they are read."""
    served = "" if facts["served"] else ", which is not served" + (f": {facts['reason']}" if "reason" in facts else "")
    lines = {
        "architecture": one_line(facts["architecture"], "not said") + served,
        "name": one_line(facts["name"]),
        "parameters": one_line(facts["parameters"]),
        "size": megabytes(facts["bytes"]) + (f" in {facts['files']} files" if facts["files"] > 1 else ""),
    }
    if "num_experts" in facts:
        shared = ", and a shared one" if facts["shared_expert_size"] else ""
        lines["experts"] = f"{facts['num_experts']} in a layer, {facts['experts_per_token']} for each token{shared}"
    if "loaded_by" in facts:
        lines["loaded by"] = ", ".join(facts["loaded_by"])
    if "labels" in facts:
        names = ", ".join(map(one_line, facts["labels"])) if facts["labels"] else "without names"
        lines["labels"] = one_line(f"{facts['num_labels']}: {names}")
    if "embed" in facts:
        lines["embed"] = embed_line(**facts["embed"])
        lines["fill"] = "words for masked tokens" if facts["fill"] else "no: there is no masked-language head"
    return lines | {
        "context": one_line(facts["context_length"], "not said"),
        "vocabulary": "none" if facts["vocab_size"] is None else one_line(facts["vocab_size"]) + " tokens",
        "tokenizer": ", ".join(map(one_line, facts["tokenizer"])) or "none",
        "chat template": "yes" if facts["chat_template"] else "no",
        **({"quantization": facts["quantization"] or "none"} if "quantization" in facts else {}),
    }


def embed_line(*, error: str | None = None, **settings: Any) -> str:
    """How an encoder embeds. settings: those of `Sentences`, if its files have no error."""
    if error is not None:
        return f"no: {error}"
    own = Sentences(**settings)
    line = {"mean": "the mean of all tokens", "first": "the first token"}[own.pooling]
    line += ", normalized" if own.normalize else ""
    line += f", of at most {own.max_tokens:,} tokens" if own.max_tokens else ""
    if own.prompts:
        default = "" if own.default_prompt_name is None else f" (default {own.default_prompt_name})"
        line += f"; prompts {', '.join(map(one_line, own.prompts))}{default}"
    return line


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def one_line(value: Any, missing: str = "none") -> str:
    """A value of a file as it can be shown in a terminal."""
    if isinstance(value, int):
        return f"{value:,}"
    text = missing if value is None else str(value)[:100]
    return text if text.isprintable() else repr(text)[1:-1]


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
