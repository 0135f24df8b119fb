"""torchao, of a matrix X (N, C) with G groups of columns:

    X._weight_qdata (N, C) int8, X._weight_scale (N, G), X._weight_zero_point (N, G) int8

Source: torchao's Int8Tensor.
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
)
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.ops.quantized_weight import GROUP_SIZES
from fastgpt.schema import only


def read_scheme(entries: dict, prefix: str) -> Scheme:
    kinds = schema.read({"quant_type": schema.mapping()}, entries, prefix)["quant_type"]
    prefix += "quant_type."
    kind = schema.read({"default": schema.mapping()}, kinds, prefix, closed=True)["default"]
    prefix += "default."
    data = schema.read({"_type": only("Int8WeightOnlyConfig"), "_data": schema.mapping()}, kind, prefix)["_data"]
    group_size = schema.read({"group_size": one_of(GROUP_SIZES, None)}, data, f"{prefix}_data.")["group_size"]
    granularity = data.get("granularity")
    if isinstance(granularity, dict) and granularity.get("_type") == "PerGroup":
        data = schema.read({"_data": schema.mapping()}, granularity, f"{prefix}_data.granularity.")["_data"]
        sizes = {"group_size": one_of(GROUP_SIZES[:-1])}
        group_size = schema.read(sizes, data, f"{prefix}_data.granularity._data.")["group_size"]
    return Scheme("", 8, group_size, True, False, None)


def shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    return matrix_shape(tensor, "I8")


def check(main: str, scheme: Scheme, N: int, C: int, G: int, require: Shapes) -> None:
    require("._weight_scale", (N, G))
    if "._weight_zero_point" in require.parts:
        require("._weight_zero_point", (N, G), dtype="I8")


def numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    zero = matrix.parts.get("._weight_zero_point")
    return Numbers(
        from_signed(matrix, matrix.parts["._weight_qdata"].read(rows)),
        matrix.parts["._weight_scale"].read(rows),
        None if zero is None else zero.read(rows).to(torch.int16) + 128,
    )


TORCHAO = Method(read_scheme, ("._weight_qdata",), "._weight_scale", ("._weight_zero_point",), shape, check, numbers)
