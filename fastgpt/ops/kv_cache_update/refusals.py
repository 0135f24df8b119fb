"""Which implementations serve a KV-cache update."""

import functools

import torch

from fastgpt.ops.derivatives import derivatives_refused
from fastgpt.ops.implementations import runs_elsewhere, triton_unusable
from fastgpt.ops.kv_cache_update import operators
from fastgpt.ops.kv_cache_update.checks import KERNEL_DTYPES
from fastgpt.ops.library import CUDA_MISSING


def _kernel_refuses(k, *others):
    if k.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and k is {k.dtype}"
    return derivatives_refused(k, *others)


def _cuda_refuses(k, *others):
    if not k.is_cuda:
        return runs_elsewhere("CUDA", "k", k.device)
    if (reason := CUDA_MISSING or _kernel_refuses(k, *others)) is not None:
        return reason
    if torch.compiler.is_compiling() or type(k) is not torch.Tensor:
        return None  # traced: no launch can be tried
    if k.device not in _TRIED:
        if torch.cuda.is_current_stream_capturing():
            return None
        _TRIED.add(k.device)
    return _launch_fails(k.device)


_TRIED: set[torch.device] = set()  # devices for which `_launch_fails` has a cached answer, also under graph capture


@functools.cache
def _launch_fails(device: torch.device) -> str | None:
    """Why the kernels of the CUDA library do not run on a device, or None. Stores a number and reads it back, once."""
    try:
        one, caches = torch.ones(1, 1, 1, 1, device=device), torch.zeros(2, 1, 1, 1, 1, device=device)
        operators.DEFAULT[0](one, one, *caches, torch.zeros(1, 1, dtype=torch.int32, device=device), None, None, None)
        got = caches.flatten().tolist()
    except RuntimeError as error:
        got = str(error).partition("\n")[0]
    if got == [1.0, 1.0]:
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return (
        f"its kernels do not run on {device} ({got}): build fastgpt again with TORCH_CUDA_ARCH_LIST={capability}, by an nvcc "
        f"of CUDA {torch.version.cuda}"
    )


def _triton_refuses(k, *others):
    if not k.is_cuda:
        return runs_elsewhere("CUDA", "k", k.device)
    return triton_unusable(k.device) or _kernel_refuses(k, *others)


def _cpp_refuses(k, *others):
    if not k.is_cpu:
        return runs_elsewhere("CPU", "k", k.device)
    return _kernel_refuses(k, *others)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {
    "cpp": _cpp_refuses, "cuda": _cuda_refuses, "triton": _triton_refuses, "reference": lambda *tensors: None,
}  # fmt: skip
