"""Quantization of cache rows to 8 bits: the definition, which kernels reproduce bit for bit."""

import torch

# Element type -> the value that the largest magnitude of a row is scaled to.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
QUANTIZED_DTYPES = tuple(LIMITS)
SMALLEST = 1e-30  # rows with a smaller largest magnitude are stored as zeros


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes rows x (..., D) to int8 or float8_e4m3fn: (values (..., D) in that dtype, scales (...) fp32).

    values = round(x · limit / max|x|), ties to even;  scale = max|x| / limit. See `kv_cache_update`.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    # As a tensor: dividing by a number, or a number by a tensor, PyTorch multiplies with a rounded reciprocal.
    limit = torch.full_like(largest, LIMITS[dtype])
    finite, large = largest.isfinite(), largest >= SMALLEST
    factor = torch.where(finite & large, limit / largest, 0.0).unsqueeze(-1)
    scaled = torch.where(factor > 0, x * factor, 0.0)
    values = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return values, torch.where(finite, torch.where(large, largest / limit, 0.0), torch.nan)


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dequantizes values (..., D) with scales (...) to dtype."""
    return values.to(dtype) * scale.unsqueeze(-1).to(dtype)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, viewed as uint8 if it is float8, which PyTorch cannot index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
