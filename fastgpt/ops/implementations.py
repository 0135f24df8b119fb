"""The choice among the implementations of an operation, and the reasons for it."""

import functools
import importlib.util

import torch
from torch._C import _is_any_autocast_enabled as _any_autocast_enabled  # four times as fast as the check for one device

from fastgpt.ops.derivatives import derivatives_possible, derivatives_refused
from fastgpt.ops.quantized_weight import QuantizedWeight

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MIN_CAPABILITY = 8, 0  # the kernels use its instructions, such as bf16 products


@functools.cache  # formatting a device takes a microsecond
def runs_elsewhere(kind: str, name: str, device: torch.device) -> str:
    """Why an implementation refuses a tensor on another kind of device."""
    return f"it runs on {kind} tensors, and {name} is on {device}"


def triton_unusable(device: torch.device) -> str | None:
    """Why no Triton kernel of the package runs on a CUDA device, or None. A device that is not there, for which a graph is
    being compiled, counts as new enough."""
    return _too_old(device) if TRITON_INSTALLED else "triton is not installed"


def _too_old(device: torch.device) -> str | None:
    try:
        capability = _capability(torch.cuda.get_device_capability, device)
    except (AssertionError, RuntimeError):  # this torch has no CUDA, or it finds no device
        return None
    return None if capability >= MIN_CAPABILITY else _too_old_sentence(device, capability)


# This is what torch.compiler.assume_constant_result sets, without importing torch.compile, which takes seconds. Traced, the
# check would become an unsupported part of the graph.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have any


@functools.cache  # the query takes microseconds
def _capability(ask, device: torch.device) -> tuple[int, int]:
    return tuple(ask(device))


@functools.cache
def _too_old_sentence(device: torch.device, capability: tuple[int, int]) -> str:
    needed, found = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
    return f"it needs a GPU of compute capability {needed} or newer, and {device} has {found}"


def require_impl(implementations: dict, impl: str | None) -> None:
    if impl is not None and not (isinstance(impl, str) and impl in implementations):
        raise ValueError(f"impl: expected one of {', '.join(map(repr, implementations))} or None, got {impl!r}")


def choose(operation: str, implementations: dict, impl: str | None, *call) -> str:
    """The name of the implementation that serves this call.

    Args:
        operation: its name, for the error.
        implementations: name -> function of the call's arguments that returns why it cannot serve them, or None; in order
            of preference.
        impl: the required implementation, or None.
        call: the arguments of those functions.

    Raises: ValueError if `impl` is unknown or cannot serve the call.
    """
    if impl is None:
        for name, refuses in implementations.items():
            if refuses(*call) is None:
                return name
        raise ValueError(f"{operation}: no implementation serves this call: {explain_call(implementations, *call)}")
    require_impl(implementations, impl)
    reason = implementations[impl](*call)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot serve this call: {reason}")
    return impl


def explain_call(implementations: dict, *call, impl: str | None = None) -> dict[str, str]:
    """implementation -> "chosen", "available", or why it cannot serve the call.

    Args:
        impl: of the call. Raises ValueError, as the call does, if it is unknown or cannot serve it.
    """
    reasons = {name: refuses(*call) for name, refuses in implementations.items()}
    if impl is None:
        chosen = next((name for name, reason in reasons.items() if reason is None), None)
    else:
        chosen = choose("explain", implementations, impl, *call)
    return {
        name: reason if reason is not None else "chosen" if name == chosen else "available" for name, reason in reasons.items()
    }


INFERENCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the inference kernels, C++ and Triton


def inference_unsupported_reason(x: torch.Tensor, *others, device: str = "cpu") -> str | None:
    """Why the inference kernels of `linear` and `norm` (C++ on "cpu", Triton on "cuda") cannot serve x and the other tensors
    (some may be None), or None. Runs at each call, hence one function for both devices."""
    if not (x.is_cpu if device == "cpu" else x.is_cuda):
        return runs_elsewhere(device.upper(), "x", x.device)
    if x.dtype is torch.float64:
        return "it takes fp32, fp16 and bf16, and x is torch.float64"
    if _any_autocast_enabled() and torch.is_autocast_enabled(device):
        return "it does not support autocast, which is on"
    return derivatives_refused(x, *others) if derivatives_possible() else None


def triton_inference_unsupported_reason(*tensors, weight: torch.Tensor | None = None) -> str | None:
    """Why the Triton inference kernels cannot serve these tensors (some may be None), or None. weight: the one of them that may be
    quantized."""
    if tensors[0].is_cuda and (reason := triton_unusable(tensors[0].device)) is not None:
        return reason
    reason = inference_unsupported_reason(*tensors, device="cuda")
    if reason is None and any(isinstance(x, QuantizedWeight) and x is not weight for x in tensors):
        reason = "it does not take quantized weights"
    return reason
