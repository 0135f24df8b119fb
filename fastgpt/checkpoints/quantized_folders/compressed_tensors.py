"""compressed-tensors, of a matrix X (N, C) with G groups of columns:

    X.weight_packed (N, C·bits/32) int32, or X.weight (N, C) int8; X.weight_scale (N, G);
    X.weight_zero_point (N, G) int8, or (N·bits/32, G) int32

Source: compressed-tensors' compressors.
"""

import torch

from fastgpt import schema
from fastgpt.checkpoints.quantized_folders.matrix import (
    Method,
    Numbers,
    QuantizedMatrix,
    Scheme,
    Shapes,
    from_signed,
    matrix_shape,
    one_of,
    unpacked,
    words_of,
)
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.ops.quantized_weight import GROUP_SIZES
from fastgpt.schema import Field, flag, only, unsupported


def read_scheme(entries: dict, prefix: str) -> Scheme:
    formats = "pack-quantized", "int-quantized", "naive-quantized"
    read = schema.read(
        {
            "format": schema.choice((*formats, "mixed-precision")),
            "config_groups": schema.mapping(),
            "kv_cache_scheme": unsupported(),
            "sparsity_config": Field(_dense, None),
            "transform_config": Field(_dense, None),
            "quantization_status": schema.choice(("compressed",), "compressed"),
        },
        entries,
        prefix,
    )
    prefix += "config_groups"
    groups = read["config_groups"]
    if len(groups) != 1:
        raise ValueError(f"{prefix}: expected one group of modules, got {', '.join(groups) or 'none'}")
    ((name, group),) = groups.items()
    group = schema.read({name: schema.mapping()}, groups, f"{prefix}.")[name]
    prefix += f".{name}."
    weights = schema.read(
        {
            "weights": schema.mapping(),
            "input_activations": unsupported(),
            "output_activations": unsupported(),
            "format": schema.choice((None, *formats), None),
        },
        group,
        prefix,
    )["weights"]
    found = schema.read(
        {
            "num_bits": one_of((4, 8)),
            "type": only("int", "int"),
            "symmetric": flag(True),
            "strategy": schema.choice(("group", "channel")),
            "group_size": one_of((*GROUP_SIZES, -1), None),
            "dynamic": only(False, False),
            "actorder": schema.choice((None, "weight", "static"), None),
        },
        weights,
        f"{prefix}weights.",
    )
    if found["strategy"] == "group" and found["group_size"] in (None, -1):
        raise ValueError(f"{prefix}weights.group_size: expected 32, 64 or 128, got {found['group_size']!r}")
    group_size = found["group_size"] if found["strategy"] == "group" else None
    return Scheme("", found["num_bits"], group_size, found["symmetric"], False, None)


def _dense(name, value):
    if value and not (isinstance(value, dict) and value.get("format") == "dense"):
        raise ValueError(f"{name}: expected none, since it is not supported, got {value!r:.100}")
    return value


def shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    if main == ".weight":
        return matrix_shape(tensor, "I8")
    rows, columns = matrix_shape(tensor, "I32")
    return rows, columns * 32 // scheme.bits


def check(main: str, scheme: Scheme, N: int, C: int, G: int, require: Shapes) -> None:
    require(".weight_scale", (N, G))
    if ".weight_shape" in require.parts:
        require(".weight_shape", (2,))
        tensor = require.parts[".weight_shape"]
        if (stored := tensor.read(slice(None)).tolist()) != [N, C]:
            raise ValueError(
                f"model: {tensor.path}: {tensor.name}: expected {[N, C]}, as of {require.tensor.name}, got {stored}"
            )
    if ".weight_g_idx" in require.parts:
        name = require.parts[".weight_g_idx"].name
        raise ValueError(
            f"model: {require.tensor.path}: {name}: expected none, since groups in another order are not supported"
        )
    if scheme.symmetric and ".weight_zero_point" not in require.parts:
        return
    packed = require.parts.get(".weight_zero_point")
    is_packed = packed is not None and packed.dtype == "I32"
    require(".weight_zero_point", (-(-N * scheme.bits // 32), G) if is_packed else (N, G), dtype="I32" if is_packed else "I8")


def numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    parts, bits = matrix.parts, matrix.scheme.bits
    half = 2 ** (bits - 1)
    if matrix.main == ".weight":
        q = from_signed(matrix, parts[".weight"].read(rows))
    else:
        q = unpacked(parts[".weight_packed"].read(rows), bits)
    zero = None
    if (stored := parts.get(".weight_zero_point")) is not None:
        if stored.dtype == "I8":
            zero = stored.read(rows).to(torch.int16) + half
        else:
            zero = unpacked(stored.read(words_of(rows, 32 // bits)).t(), bits).t()[: rows.stop - rows.start]
    return Numbers(q, parts[".weight_scale"].read(rows), zero)


OTHERS = ".weight_zero_point", ".weight_shape", ".weight_g_idx"
COMPRESSED_TENSORS = Method(read_scheme, (".weight_packed", ".weight"), ".weight_scale", OTHERS, shape, check, numbers)
