"""The input checks of the KV-cache update, argument by argument."""

import torch

from fastgpt.checks import require_device, require_dtype, require_last_dim_contiguous, require_shape, require_tensor
from fastgpt.ops.quantization import QUANTIZED_DTYPES

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TRANSFORMED_DIM = 1024  # head dim of rows that are rotated or quantized


def check_update(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    slots_name: str = "positions",
) -> None:
    """Raises TypeError, ValueError for arguments of kv_cache_update, except for positions and pages out of range."""
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    require_tensor("k_cache", k_cache, 4)
    require_tensor("v_cache", v_cache, 4)
    require_tensor(slots_name, slots, 2)
    B, H_kv, T, D = k.shape
    S = k_cache.shape[2]
    require_dtype("k", k, (*KERNEL_DTYPES, torch.float64))
    require_dtype("v", v, (k.dtype,))
    require_dtype("k_cache", k_cache, (k.dtype, *QUANTIZED_DTYPES))
    require_dtype("v_cache", v_cache, (k_cache.dtype,))
    require_dtype(slots_name, slots, (torch.int32, torch.int64))
    D_v = v.shape[3]
    require_shape("v", v, (B, H_kv, T, D_v), "(B, H_kv, T, D_v) to match k")
    require_shape(slots_name, slots, (B, T), "(B, T)")
    tensors = {"v": v, "k_cache": k_cache, "v_cache": v_cache, slots_name: slots}
    if block_table is None:
        first, layout = B, "(B, H_kv, S"
    else:
        require_tensor("block_table", block_table, 2)
        require_dtype("block_table", block_table, (torch.int32,))
        require_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages)")
        first, layout = k_cache.shape[0], "(num_pages, H_kv, page"
        tensors["block_table"] = block_table
    require_shape("k_cache", k_cache, (first, H_kv, S, D), f"{layout}, D) to match k")
    require_shape("v_cache", v_cache, (first, H_kv, S, D_v), f"{layout}, D_v) to match k_cache and v")
    for name, scale, x in (("k_scale", k_scale, k), ("v_scale", v_scale, v)):
        if k_cache.dtype not in QUANTIZED_DTYPES:
            if scale is not None:
                raise ValueError(f"{name}: expected None for a cache of {k_cache.dtype}, got a scale")
            continue
        if scale is None:
            raise ValueError(f"{name}: expected a scale for a cache of {k_cache.dtype}, got None")
        require_tensor(name, scale, 3)
        require_dtype(name, scale, (torch.float32,))
        require_shape(name, scale, (first, H_kv, S), f"{layout}) to match k_cache")
        tensors[name] = scale
        if not 1 <= x.shape[3] <= MAX_TRANSFORMED_DIM:
            expected = f"a head dim from 1 to {MAX_TRANSFORMED_DIM} for a cache of {k_cache.dtype}"
            raise ValueError(f"{name[0]}: expected {expected}, got {x.shape[3]}")
    for name, tensor in tensors.items():
        require_device(name, tensor, k.device)
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_last_dim_contiguous(name, tensor)


def check_rope_update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """`check_update` for rope_kv_cache_update."""
    stored = ("positions", positions) if slots is None else ("slots", slots)
    check_update(k, v, k_cache, v_cache, stored[1], block_table, k_scale, v_scale, stored[0])
    _check_rotation(q, k, positions, cos, sin)


def _check_rotation(q, k, positions, cos, sin):
    """The arguments that only rope_kv_cache_update has."""
    require_tensor("q", q, 4)
    B, _, T, D = k.shape
    require_dtype("q", q, (k.dtype,))
    require_shape("q", q, (B, q.shape[1], T, D), "(B, H, T, D) to match k")
    require_device("q", q, k.device)
    require_last_dim_contiguous("q", q)
    require_tensor("positions", positions, 2)
    require_dtype("positions", positions, (torch.int32, torch.int64))
    require_shape("positions", positions, (B, T), "(B, T)")
    require_device("positions", positions, k.device)
    require_tensor("cos", cos, 2)
    require_tensor("sin", sin, 2)
    if not 1 <= cos.shape[1] <= D // 2:
        raise ValueError(f"cos: expected from 1 to D / 2 = {D // 2} columns, got shape {tuple(cos.shape)}")
    if D > MAX_TRANSFORMED_DIM:
        raise ValueError(f"q: expected a head dim up to {MAX_TRANSFORMED_DIM}, got {D}")
    require_shape("sin", sin, tuple(cos.shape), "to match cos")
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_dtype(name, tensor, (torch.float32,) if k.dtype != torch.float64 else (torch.float32, torch.float64))
        require_device(name, tensor, k.device)
        require_last_dim_contiguous(name, tensor)


def check_slots(
    positions: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor | None, name: str = "positions"
) -> None:
    """On CPU, raises ValueError for positions and pages out of range; on CUDA that would need a device sync."""
    if positions.device.type != "cpu" or positions.numel() == 0:
        return
    rows = k_cache.shape[2]
    capacity = rows if block_table is None else rows * block_table.shape[1]
    if (last := positions.max().item()) >= capacity:
        raise ValueError(f"{name}: expected values below the cache's capacity of {capacity}, got {last}")
    if block_table is not None and capacity:
        b, t = (positions >= 0).nonzero(as_tuple=True)
        pages = block_table[b, positions[b, t].long() // rows]
        outside = pages[(pages < 0) | (pages >= k_cache.shape[0])]
        if outside.numel():
            raise ValueError(f"block_table: expected pages from 0 to {k_cache.shape[0] - 1}, got {outside[0].item()}")


def check_rope_slots(
    k_cache: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    slots: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    """`check_slots` for rope_kv_cache_update; also of positions past the rows of cos."""
    if positions.device.type == "cpu" and positions.numel() and (last := positions.max().item()) >= cos.shape[0]:
        raise ValueError(f"positions: expected values below the {cos.shape[0]} rows of cos, got {last}")
    if slots is None:
        check_slots(positions, k_cache, block_table)
    else:
        check_slots(slots, k_cache, block_table, "slots")
