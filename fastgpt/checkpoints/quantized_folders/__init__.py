"""Quantized matrices in folders of transformers, as others write them: what config.json says of them, and how they are stored.

METHODS has the layout of each quant_method, whose matrices are of integers, as `matrix.QuantizedMatrix` reads them. Experts in
MXFP4, and blocks as we write them, are read by `mxfp4` and `own`.
"""

from collections.abc import Mapping, Sequence

from fastgpt import schema
from fastgpt.checkpoints.loading import Stored
from fastgpt.checkpoints.quantized_folders import matrix, mxfp4, own
from fastgpt.checkpoints.quantized_folders.awq import AWQ
from fastgpt.checkpoints.quantized_folders.compressed_tensors import COMPRESSED_TENSORS
from fastgpt.checkpoints.quantized_folders.gptq import GPTQ
from fastgpt.checkpoints.quantized_folders.matrix import Scheme
from fastgpt.checkpoints.quantized_folders.mxfp4 import MXFP4
from fastgpt.checkpoints.quantized_folders.own import OWN, own_metadata
from fastgpt.checkpoints.quantized_folders.torchao import TORCHAO
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.schema import Field

__all__ = ["ENTRY", "METHODS", "MXFP4", "OWN", "Scheme", "matrices", "own_metadata", "scheme"]
ENTRY = "quantization_config"  # of config.json
METHODS = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": COMPRESSED_TENSORS, "torchao": TORCHAO}
SAID = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in config.json


def scheme(config: dict) -> Scheme | None:
    """What config.json says of quantized matrices; None: there are none.

    Raises: ValueError, naming the entry, for a quantization that is not served.
    """
    entries = schema.read({ENTRY: schema.mapping(None, optional=True)}, config)[ENTRY]
    if entries is None:
        return None
    prefix = f"{ENTRY}."
    method = schema.read({"quant_method": schema.choice((*METHODS, MXFP4, OWN))}, entries, prefix)["quant_method"]
    said = schema.read({"dtype": Field(_any, None), "torch_dtype": Field(_any, None)}, config)
    dtype = next((name for name, word in SAID.items() if word in (said["dtype"], said["torch_dtype"])), None)
    if method in (MXFP4, OWN):
        return Scheme(method, 0, None, False, False, dtype)
    return METHODS[method].scheme(entries, prefix)._replace(method=method, dtype=dtype)


def _any(name, value):
    return value


def matrices(found: Sequence[SafetensorsTensor], scheme: Scheme, metadata: Mapping[str, str]) -> list[Stored]:
    """The tensors that are stored, each quantized matrix as one of them.

    Args:
        metadata: of the safetensors files.

    Raises: ValueError that names a tensor which is missing, misshapen or of another dtype.
    """
    if scheme.method == OWN:
        return own.matrices(found, scheme, metadata)
    if scheme.method == MXFP4:
        return mxfp4.matrices(found, scheme)
    return matrix.matrices(found, scheme, METHODS[scheme.method])
