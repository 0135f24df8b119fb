"""Programmatic dependent launch: a kernel's programs start, and read ahead, while the kernel before in the stream still runs.

A decode step of a small model is dozens of kernels of a few microseconds each, and between two of them the GPU idles: the last
programs end, their stores become visible, the next programs start and wait for memory. A kernel that is launched with
`launch_pdl` may start as soon as all programs of the one before have let it (`let_next_start`) or have ended. What is visible
to it then is told by `wait_for_previous` alone, which returns when the kernel before has ended and all that it stored is there.

The rules, which tests hold every kernel of a step to:

- Every program waits, whatever it does, before its first access to global memory, and so before it ends. Since the kernel
  before waited likewise, all earlier ones have ended, too: nothing is read too early, and nothing is overwritten that one of
  them may still read. That includes weights and tables, which a kernel before may have written: an optimizer's, say.
- Before it waits, a program may `read_ahead`. That moves memory into the L2 cache, through which all of the GPU's stores go: it
  changes what a later load costs, never what it gives.
- A program lets the next kernel start when it starts itself. That cannot take the place of its own kernel's programs: they all
  have started, with the registers, shared and tensor memory that they need, when the last one has let it.

A kernel that is launched otherwise, PyTorch's for example, starts when everything before it has ended, and one after it waits
for its end like for any other. Stream capture keeps the dependency as a programmatic edge of the CUDA graph, from CUDA 12.3 on.

Source: CUDA Programming Guide, 4.5 Programmatic Dependent Launch and Synchronization; PTX ISA, griddepcontrol.
"""

import functools

import torch
import triton
import triton.language as tl

LEAST_CAPABILITY = 9, 0
LEAST_DRIVER = 12030  # CUDA 12.3: whose graphs have programmatic edges
MOST_AHEAD = tl.constexpr(64 << 10)  # bytes that a program reads ahead: so that all of a GPU's programs fit in the L2 cache


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a device and its driver have it. A driver that cannot be asked counts as new enough."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask is None or ask() >= LEAST_DRIVER


def dependent_launch(has_it: bool) -> dict:
    """A kernel's compile-time argument and the option of its launch."""
    return {"PDL": True, "launch_pdl": True} if has_it else {"PDL": False}


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """To be called first."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """To be called before any access to global memory."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def read_ahead(ptr, n_bytes, PDL: tl.constexpr):
    """Moves what lies from the pointer on, or as much as is sensible of it, into the L2 cache, by one thread's instruction."""
    if PDL:
        # It takes whole units of 16 bytes, which lie in the same page of memory as the bytes that they are rounded from.
        address = ptr.to(tl.int64, bitcast=True)
        start = address & -16
        count = (address + tl.minimum(n_bytes, MOST_AHEAD) + 15 & -16) - start
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
