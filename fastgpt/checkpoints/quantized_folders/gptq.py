"""GPTQ, of a matrix X (N, C) with G groups of columns:

    X.qweight (C·bits/32, N) int32, X.qzeros (G, N·bits/32) int32, X.scales (G, N), X.g_idx (C,) int32

Source: AutoGPTQ's linear layer.
"""

import torch

from fastgpt import schema
from fastgpt.checkpoints.quantized_folders.matrix import (
    Method,
    Numbers,
    QuantizedMatrix,
    Scheme,
    Shapes,
    group_size_of,
    matrix_shape,
    one_of,
    unpacked,
    words_of,
)
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.schema import Field, flag, unsupported


def read_scheme(entries: dict, prefix: str) -> Scheme:
    read = schema.read(
        {
            "bits": one_of((4, 8)),
            "group_size": one_of((32, 64, 128, -1)),
            "sym": flag(True),
            "desc_act": flag(False),  # g_idx says whether the columns are in another order
            "checkpoint_format": schema.choice(("gptq", "gptq_v2"), "gptq"),
            "format": schema.choice(("gptq", "gptq_v2"), "gptq"),
            "is_marlin_format": unsupported(),
            "dynamic": Field(_no_rules, None),
            "lm_head": flag(False),
        },
        entries,
        prefix,
    )
    newer = "gptq_v2" in (read["checkpoint_format"], read["format"])
    return Scheme("", read["bits"], group_size_of(read["group_size"]), read["sym"], not newer, None)


def _no_rules(name, value):
    if value:
        raise ValueError(f"{name}: expected no rules for single modules, since they are not supported, got {value!r:.100}")
    return value


def shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    rows, columns = matrix_shape(tensor, "I32")
    return columns, rows * 32 // scheme.bits


def check(main: str, scheme: Scheme, N: int, C: int, G: int, require: Shapes) -> None:
    require(".scales", (G, N))
    require(".qzeros", (G, N * scheme.bits // 32), dtype="I32")
    if ".g_idx" not in require.parts:
        return
    require(".g_idx", (C,), dtype="I32")
    tensor = require.parts[".g_idx"]
    if not torch.equal(tensor.read(slice(None)).long(), torch.arange(C) // (C // G)):
        raise ValueError(
            f"model: {tensor.path}: {tensor.name}: expected groups of consecutive columns, got another order, which desc_act (act-order) "
            "makes: it is not supported"
        )


def numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    parts, bits = matrix.parts, matrix.scheme.bits
    q = unpacked(parts[".qweight"].read_columns(rows).t(), bits)
    zero = unpacked(parts[".qzeros"].read_columns(words_of(rows, 32 // bits)), bits).t().to(torch.int16)
    return Numbers(q, parts[".scales"].read_columns(rows).t(), zero + 1 if matrix.scheme.one_less else zero)


GPTQ = Method(read_scheme, (".qweight",), ".scales", (".qzeros", ".g_idx"), shape, check, numbers)
