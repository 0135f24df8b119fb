"""How a cache row is stored in 8 bits: the definition that references use and kernels reproduce bit for bit."""

import torch

# Element type -> the largest number that a row's largest magnitude becomes.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
QUANTIZED_DTYPES = tuple(LIMITS)
SMALLEST = 1e-30  # rows whose largest magnitude is below are zero


def quantize(x, dtype):
    """Rows of numbers (..., D) -> the same in `dtype` (int8 or float8_e4m3fn), and a scale (...) fp32 for each row.

    values = round(x · limit / max|x|), ties to even;  scale = max|x| / limit. See `kv_cache_update`.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    # Tensors by tensors: PyTorch divides by a number, or a number by a tensor, through the rounded reciprocal.
    limit = torch.full_like(largest, LIMITS[dtype])
    finite, large = largest.isfinite(), largest >= SMALLEST
    factor = torch.where(finite & large, limit / largest, 0.0).unsqueeze(-1)
    scaled = torch.where(factor > 0, x * factor, 0.0)
    values = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return values, torch.where(finite, torch.where(large, largest / limit, 0.0), torch.nan)


def dequantize(values, scale, dtype=torch.float32):
    """The numbers that `values` (..., D) with scale (...) stand for."""
    return values.to(dtype) * scale.unsqueeze(-1).to(dtype)


def as_bytes(x):
    """x, or its bytes if it is of 8-bit floats, which PyTorch cannot index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
