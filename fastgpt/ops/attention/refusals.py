"""Which implementations serve an attention call."""

import torch

from fastgpt.ops.attention.call import Call
from fastgpt.ops.attention.checks import KERNEL_DTYPES, triton_refuses_head_dims
from fastgpt.ops.derivatives import TRANSFORMED, transforms_active
from fastgpt.ops.implementations import runs_elsewhere, triton_unusable


def needs_gradients(call: Call) -> bool:
    """Whether autograd will ask for a gradient of this call."""
    if not torch.is_grad_enabled():
        return False
    for x in (call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes, call.k_scale, call.v_scale):
        if x is not None and x.requires_grad:
            return True
    return False


def triton_refuses(call: Call) -> str | None:
    if not call.q.is_cuda:
        return runs_elsewhere("CUDA", "q", call.q.device)
    if (reason := triton_unusable(call.q.device)) is not None:
        return reason
    if call.q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {call.q.dtype}"
    if isinstance(call.v, torch.Tensor) and call.v.dim() == call.q.dim():  # otherwise check_call raises
        if (reason := triton_refuses_head_dims(call.q, call.v, needs_gradients(call))) is not None:
            return reason
    return _cannot_differentiate(call)


def cpp_refuses(call: Call) -> str | None:
    if not call.q.is_cpu:
        return runs_elsewhere("CPU", "q", call.q.device)
    if call.q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {call.q.dtype}"
    return _cannot_differentiate(call)


def _cannot_differentiate(call: Call):
    """Why the kernels cannot compute the required derivatives, or None."""
    if transforms_active():
        return TRANSFORMED
    if not needs_gradients(call):
        return None
    if call.block_table is not None or call.k_scale is not None:
        return "it has no backward through a block table or 8-bit keys, and a gradient is required"
    if call.alibi_slopes is not None and call.alibi_slopes.requires_grad:
        return "it has no gradient by alibi_slopes, and that is required"
    return None


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cpp": cpp_refuses, "triton": triton_refuses, "reference": lambda call: None}
VARLEN_IMPLEMENTATIONS = {
    "cpp": cpp_refuses,
    "triton": triton_refuses,
    "reference": lambda call: None,
}
