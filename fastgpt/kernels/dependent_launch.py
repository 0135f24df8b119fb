"""Programmatic dependent launch (PDL): a kernel starts, and prefetches, while the previous kernel in the stream still runs.

A decode step of a small model is dozens of kernels of a few microseconds each, and between two of them the GPU idles: the last
programs end, their stores become visible, the next programs start and wait for memory. A kernel that is launched with
`launch_pdl` may start as soon as all programs of the previous kernel have called `launch_dependents` or ended. It sees the
previous kernel's stores only after `wait_for_dependencies`, which returns when that kernel has ended and flushed its memory.

The rules, which tests enforce for every kernel of a step:

- Every program waits, on every path, before its first access to global memory, and so before it ends. Since the previous
  kernel waited likewise, all earlier ones have ended, too: nothing is read too early, and nothing is overwritten that one of
  them may still read. That includes weights and tables, which an earlier kernel, an optimizer's say, may have written.
- Before it waits, a program may `prefetch_to_l2`. All of the GPU's stores go through the L2 cache, so that changes the time of
  a later load, never its result.
- A program calls `launch_dependents` first. The next kernel cannot take resources from its own kernel: when the last program
  has called it, all programs have started, with the registers, shared and tensor memory that they need.

A kernel that is launched without the option, PyTorch's for example, starts when everything before it has ended, and a kernel
after it waits for its end as usual. Stream capture keeps the dependency as a programmatic edge of the CUDA graph, from CUDA 12.3
on.

Source: CUDA Programming Guide, 4.5 Programmatic Dependent Launch and Synchronization; PTX ISA, griddepcontrol.
"""

import functools

import torch
import triton
import triton.language as tl

MIN_CAPABILITY = 9, 0
MIN_DRIVER = 12030  # CUDA 12.3, whose graphs have programmatic edges
MAX_PREFETCH_BYTES = tl.constexpr(64 << 10)  # of a program, so that those of all programs on a GPU fit in the L2 cache


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a device and its driver support it. A driver of unknown version counts as new enough."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask is None or ask() >= MIN_DRIVER


def dependent_launch(has_it: bool) -> dict:
    """A kernel's compile-time argument PDL and its launch option."""
    return {"PDL": True, "launch_pdl": True} if has_it else {"PDL": False}


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel start. To be called first."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Waits until the previous kernel has ended. To be called before any access to global memory."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(ptr, n_bytes, PDL: tl.constexpr):
    """Prefetches n_bytes from the pointer on, up to MAX_PREFETCH_BYTES, into the L2 cache, by an instruction of one thread."""
    if PDL:
        # Rounded to units of 16 bytes, as the instruction requires; they lie in the same memory pages.
        address = ptr.to(tl.int64, bitcast=True)
        start = address & -16
        count = (address + tl.minimum(n_bytes, MAX_PREFETCH_BYTES) + 15 & -16) - start
        tl.inline_asm_elementwise(
            """{
            .reg .pred is_first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r", [start, count.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
