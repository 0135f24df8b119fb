"""The KV-cache update: contract, input checks, reference, and dispatch to the compiled kernels."""

import torch

from fastgpt.ops.checks import (
    require_device,
    require_dtype,
    require_last_dim_contiguous,
    require_shape,
    require_tensor,
)
from fastgpt.ops.implementations import choose, explain_call
from fastgpt.ops.library import CUDA_MISSING, library

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kv_cache_update(k, v, k_cache, v_cache, positions):
    """Stores new keys and values into a cache, in place.

        k_cache[b,h,p] = k[b,h,t],  v_cache[b,h,p] = v[b,h,t],   p = positions[b,t], for every p >= 0

    Args:
        k, v: (B, H_kv, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        k_cache, v_cache: (B, H_kv, S, D), dtype and device of k, strides likewise; written.
        positions: (B, T) int32|int64 on the device: the slot of each token, in tokens. Negative skips the token
            (padding). Where two tokens of a row name the same slot, the last one stays on a CPU; on CUDA either may.

    Returns None. Under CUDA it neither synchronises nor allocates, so it can be captured in a CUDA graph.

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device; on CPU a position >= S): argument,
        expected, got. Nothing is written then. On CUDA a position >= S is not written and not reported: telling
        would need a synchronisation.
    """
    try:
        if choose("kv_cache_update", IMPLEMENTATIONS, None, k) == "reference":
            _check(k, v, k_cache, v_cache, positions)
            kv_cache_update_reference(k, v, k_cache, v_cache, positions)
        else:  # which check for themselves, in a fraction of the time, before they write
            torch.ops.fastgpt.kv_cache_update.default(k, v, k_cache, v_cache, positions)
    except (RuntimeError, AttributeError):
        _check(k, v, k_cache, v_cache, positions)  # raises the error that names the argument
        if k.device.type == "cpu":
            _check_positions(positions, k_cache.shape[2])
        raise


def kv_cache_update_reference(k, v, k_cache, v_cache, positions):
    """The same function in plain PyTorch, on every device."""
    if k.device.type == "cpu":
        _check_positions(positions, k_cache.shape[2])
    b, t = ((positions >= 0) & (positions < k_cache.shape[2])).nonzero(as_tuple=True)
    slots = positions[b, t].long()
    k_cache[b, :, slots] = k[b, :, t]
    v_cache[b, :, slots] = v[b, :, t]


def _check(k, v, k_cache, v_cache, positions):
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    require_tensor("k_cache", k_cache, 4)
    require_tensor("v_cache", v_cache, 4)
    require_tensor("positions", positions, 2)
    B, H_kv, T, D = k.shape
    S = k_cache.shape[2]
    require_dtype("k", k, (*KERNEL_DTYPES, torch.float64))
    require_shape("v", v, (B, H_kv, T, D), "(B, H_kv, T, D) to match k")
    require_shape("k_cache", k_cache, (B, H_kv, S, D), "(B, H_kv, S, D) to match k")
    require_shape("v_cache", v_cache, (B, H_kv, S, D), "(B, H_kv, S, D) to match k_cache")
    require_shape("positions", positions, (B, T), "(B, T)")
    require_dtype("positions", positions, (torch.int32, torch.int64))
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_dtype(name, tensor, (k.dtype,))
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("positions", positions)):
        require_device(name, tensor, k.device)
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_last_dim_contiguous(name, tensor)


def _check_positions(positions, capacity):
    if positions.numel() and (last := positions.max().item()) >= capacity:
        raise ValueError(f"positions: expected values below the cache's capacity of {capacity}, got {last}")


def explain(k, v, k_cache, v_cache, positions):
    """Implementation -> "chosen", "available", or why it refuses this call."""
    _check(k, v, k_cache, v_cache, positions)
    return explain_call(IMPLEMENTATIONS, k)


def _kernel_refuses(k):
    return None if k.dtype in KERNEL_DTYPES else f"it takes fp32, fp16 and bf16, and k is {k.dtype}"


def _cuda_refuses(k):
    if not k.is_cuda:
        return f"it runs on CUDA tensors, and k is on {k.device}"
    return CUDA_MISSING or _kernel_refuses(k)


def _cpp_refuses(k):
    if k.device.type != "cpu":
        return f"it runs on CPU tensors, and k is on {k.device}"
    return _kernel_refuses(k)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cuda": _cuda_refuses, "cpp": _cpp_refuses, "reference": lambda k: None}


library.define("kv_cache_update(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions) -> ()")


@torch.library.register_fake("fastgpt::kv_cache_update", lib=library)
def _kv_cache_update_fake(k, v, k_cache, v_cache, positions):
    _check(k, v, k_cache, v_cache, positions)
