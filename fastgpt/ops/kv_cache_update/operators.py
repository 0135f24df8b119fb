"""The registered operations of the KV-cache update, and their Triton implementations; C++ and CUDA are in csrc/kv_cache."""

from collections.abc import Callable

import torch

from fastgpt.checks import require_dtype
from fastgpt.ops.kv_cache_update.checks import KERNEL_DTYPES, check_rope_update, check_update
from fastgpt.ops.kv_cache_update.overlap import check_overlap
from fastgpt.ops.library import CUDA_MISSING, library, without_autograd


def _kv_cache_update_fake(k, v, k_cache, v_cache, positions, block_table=None, k_scale=None, v_scale=None):
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def _rope_kv_cache_update_fake(
    q, k, v, k_cache, v_cache, positions, cos, sin,
    slots=None, interleaved=False, block_table=None, k_scale=None, v_scale=None,
):  # fmt: skip
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    return q.new_empty(q.shape)


def kv_cache_update_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    check_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)
    written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    require_dtype("k", k, KERNEL_DTYPES)
    check_overlap(written, {"k": k, "v": v, "positions": positions, "block_table": block_table})
    from fastgpt.kernels.kv_cache_update import kv_cache_update  # Triton is imported only when a CUDA tensor needs it

    kv_cache_update(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale)


def rope_kv_cache_update_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor | None = None, interleaved: bool = False,
    block_table: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    check_rope_update(q, k, v, k_cache, v_cache, positions, cos, sin, slots, block_table, k_scale, v_scale)
    written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    read = {"k": k, "v": v, "positions": positions, "block_table": block_table, "q": q, "cos": cos, "sin": sin, "slots": slots}
    require_dtype("k", k, KERNEL_DTYPES)
    check_overlap(written, read)
    from fastgpt.kernels.kv_cache_update import rope_kv_cache_update

    return rope_kv_cache_update(
        q, k, v, k_cache, v_cache, positions, cos, sin, slots, interleaved, block_table, k_scale, v_scale
    )


# Name -> schema, fake kernel, Triton implementation.
SCHEMAS = {
    "kv_cache_update": (
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? block_table=None, "
        "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()",
        _kv_cache_update_fake, kv_cache_update_triton,
    ),
    "rope_kv_cache_update": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor cos, Tensor sin, "
        "Tensor? slots=None, bool interleaved=False, Tensor? block_table=None, Tensor(c!)? k_scale=None, "
        "Tensor(d!)? v_scale=None) -> Tensor",
        _rope_kv_cache_update_fake, rope_kv_cache_update_triton,
    ),
}  # fmt: skip


def _register(suffix: str, with_triton: bool) -> tuple[Callable, ...]:
    """Registers both operations, for which the compiled libraries have kernels; with_triton: Triton serves CUDA tensors."""
    for name, (schema, fake, triton) in SCHEMAS.items():
        library.define(f"{name}{suffix}{schema}", f"fastgpt.{name}")
        torch.library.register_fake(f"fastgpt::{name}{suffix}", fake, lib=library)
        if with_triton:
            library.impl(f"{name}{suffix}", triton, "CUDA")
    return tuple(without_autograd(getattr(torch.ops.fastgpt, f"{name}{suffix}").default) for name in SCHEMAS)


# kv_cache_update and rope_kv_cache_update as the dispatcher serves them: C++ for CPU tensors; for CUDA tensors the CUDA library
# or, where that is missing, Triton.
DEFAULT: tuple[Callable, ...] = _register("", with_triton=CUDA_MISSING is not None)
# The same two with Triton for CUDA tensors.
TRITON: tuple[Callable, ...] = DEFAULT if CUDA_MISSING is not None else _register("_triton", with_triton=True)
