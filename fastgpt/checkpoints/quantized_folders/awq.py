"""AWQ, of a matrix X (N, C) with G groups of columns:

    X.qweight (C, N/8) int32, X.qzeros (G, N/8) int32, X.scales (G, N)

Source: AutoAWQ's linear layer.
"""

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
from fastgpt.schema import only

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where columns 0 to 7 are among the eight numbers of an integer, from its lowest bits on


def read_scheme(entries: dict, prefix: str) -> Scheme:
    lower = {key: value.lower() if isinstance(value, str) else value for key, value in entries.items()}
    read = schema.read(
        {
            "bits": one_of((4,)),
            "group_size": one_of((32, 64, 128, -1)),
            "zero_point": only(True, True),
            "version": only("gemm", "gemm"),
            "format": only("gemm", "gemm"),
        },
        lower,
        prefix,
    )
    return Scheme("", read["bits"], group_size_of(read["group_size"]), False, False, None)


def shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    rows, columns = matrix_shape(tensor, "I32")
    return columns * 8, rows


def check(main: str, scheme: Scheme, N: int, C: int, G: int, require: Shapes) -> None:
    require(".scales", (G, N))
    require(".qzeros", (G, N // 8), dtype="I32")


def numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    def unpacked_columns(suffix):
        numbers = unpacked(matrix.parts[suffix].read_columns(words_of(rows, 8)), 4)
        return numbers.unflatten(1, (-1, 8))[..., ORDER].flatten(1).t()

    return Numbers(
        unpacked_columns(".qweight").contiguous(), matrix.parts[".scales"].read_columns(rows).t(), unpacked_columns(".qzeros")
    )


AWQ = Method(read_scheme, (".qweight",), ".scales", (".qzeros",), shape, check, numbers)
