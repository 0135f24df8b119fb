"""Arguments and tensor descriptors that the launches of the attention kernels share."""

import functools
from typing import TypeAlias

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.architecture import architecture
from fastgpt.kernels.attention_scores import unit_of
from fastgpt.kernels.launch import Layout
from fastgpt.kernels.limits import check_count, check_sizes
from fastgpt.ops.dropout import keep_threshold

# Not specialized: integers that vary between calls must not recompile the kernel. Specialization would tell it the
# divisibility of strides, which the launcher guarantees and the kernel asserts by tl.multiple_of.
NUMBERS = [
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn",
    "stride_ob", "stride_oh", "stride_om", "stride_lb", "stride_lh",
    "stride_mask_b", "stride_mask_h", "stride_mask_m", "stride_mask_n",
    "stride_bias_b", "stride_bias_h", "stride_bias_m", "stride_bias_n",
    "stride_tb", "stride_tp", "stride_ksb", "stride_ksh", "stride_ksn", "stride_vsb", "stride_vsh", "stride_vsn",
    "page", "n_pages", "n_heads", "group", "n_queries", "n_keys", "window", "threshold",
]  # fmt: skip
BACKWARD_NUMBERS = [
    *NUMBERS, "stride_gb", "stride_gh", "stride_gm", "stride_dqb", "stride_dqh", "stride_dqm",
    "stride_dkb", "stride_dkh", "stride_dkn", "stride_dvb", "stride_dvh", "stride_dvn",
    "stride_dbb", "stride_dbh", "stride_dbm", "stride_dbn",
]  # fmt: skip
POINTERS = ["kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr", "bias_ptr"]
POINTERS += ["block_table_ptr", "k_scale_ptr", "v_scale_ptr", "seed_ptr"]
STRIDES = NUMBERS[NUMBERS.index("stride_mask_b") : NUMBERS.index("page")]  # of optional tensors
NO_STRIDES = (0,) * len(STRIDES)


Array: TypeAlias = Tensor | Layout


class Extras:
    """The optional features of attention, as the kernels take them: tensors and scalars by argument name; strides, and tensors,
    in the order of the forward kernel's arguments. Of layouts, or of the tensors themselves; vectors are contiguous."""

    def __init__(
        self, q: Array, k: Array, window: int | None, softcap: float | None, alibi_slopes: Array | None,
        sinks: Array | None, mask: Array | None, bias: Array | None, kv_lengths: Array | None, block_table: Array | None,
        k_scale: Array | None, v_scale: Array | None, dropout_p: float, dropout_seed: Array | None,
        cu_seqlens_q: Array | None, cu_seqlens_k: Array | None,
    ):  # fmt: skip
        B, H, T, _ = q.shape
        S = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
        check_sizes(q=q, k=k)
        check_count("block_table", "keys in a sequence's pages", S)
        mask = None if mask is None else mask.expand(B, H, T, S).view(torch.uint8)
        bias = None if bias is None else bias.expand(B, H, T, S)
        self.tensors = {
            "kv_lengths_ptr": kv_lengths,
            "cu_q_ptr": cu_seqlens_q,
            "cu_k_ptr": cu_seqlens_k,
            "alibi_ptr": alibi_slopes,
            "sinks_ptr": sinks,
            "mask_ptr": mask,
            "bias_ptr": bias,
            "block_table_ptr": block_table,
            "k_scale_ptr": k_scale,
            "v_scale_ptr": v_scale,
            "seed_ptr": dropout_seed if dropout_p > 0 else None,
        }
        self.strides = NO_STRIDES
        if mask is not None or bias is not None or block_table is not None or k_scale is not None:
            self.strides = (
                *((0, 0, 0, 0) if mask is None else mask.stride()),
                *((0, 0, 0, 0) if bias is None else bias.stride()),
                *((0, 0) if block_table is None else block_table.stride()),
                *((0, 0, 0, 0, 0, 0) if k_scale is None else (*k_scale.stride(), *v_scale.stride())),
            )
        self.numbers = {
            "page": k.shape[2],
            "n_pages": k.shape[0],
            "n_keys": S,
            "window": 0 if window is None else min(window, S),
            "softcap": 0.0 if softcap is None else float(softcap),
            "threshold": keep_threshold(dropout_p),
            "keep_scale": 1.0 / (1.0 - dropout_p),
        }
        self.units = unit_of(mask), unit_of(bias)
        self.ragged = kv_lengths is not None or cu_seqlens_q is not None
        # Features that take registers, and so need smaller tiles.
        features = softcap, alibi_slopes, mask, bias, block_table, k_scale, self.tensors["seed_ptr"]
        self.with_extras = any(x is not None for x in features)


def have_bulk_copies(*tensors: Array) -> bool:
    """Whether the hardware (compute capability 9.0 or later) can copy tiles of these tensors (B, heads, N, D), which have
    aligned rows, in bulk: by the tensor memory accelerator (TMA)."""
    if architecture(tensors[0].device) < 90:
        return False
    most = 2**39
    for x in tensors:
        (B, H, N, _), (stride_b, stride_h, stride_n, _) = x.shape, x.stride()
        if x.element_size() != 2 or x.numel() == 0:
            return False
        if not ((B == 1 or 0 < stride_b < most) and (H == 1 or 0 < stride_h < most) and (N == 1 or 0 < stride_n < most)):
            return False
    return True


class TileDescriptor(TensorDescriptor):
    """A descriptor of rows that are known to be aligned: Triton's checks are skipped. Its tile: see `tile_of`."""

    def __init__(self, x: Tensor, tile: dict):
        self.base = x
        self.__dict__.update(tile)


def tile_of(x: Array, rows: int, columns: int, dim: int) -> dict:
    """All of a descriptor but the tensor, for tiles of x (B, H, N, dim and what `aligned_rows` has added); see
    have_bulk_copies."""
    (B, H, N, _), (stride_b, stride_h, stride_n, _) = x.shape, x.stride()
    # The stride of a dimension of size 1 is not used, but has to be a multiple of 16 bytes.
    copy_strides = [128 if B == 1 else stride_b, 128 if H == 1 else stride_h, 128 if N == 1 else stride_n, 1]
    return {"shape": [B, H, N, dim], "strides": copy_strides, "block_shape": [1, 1, rows, columns]}


def leading_strides(x: Array, packed: bool) -> tuple[int, int, int]:
    """The first three strides of x (B, H, N, D); 0 for the batch if packed."""
    return (0, *x.stride()[1:3]) if packed else x.stride()[:3]


def strides(x: Tensor | None, prefix: str, dims: str, packed: bool = False) -> dict[str, int]:
    """stride_<prefix><dim> of each of the first dimensions, in elements; 0 if x is None, and for the batch if packed."""
    if x is None:
        return _no_strides(prefix, dims)
    result = dict(zip(_no_strides(prefix, dims), x.stride()))
    if packed:
        result[f"stride_{prefix}b"] = 0
    return result


@functools.cache
def _no_strides(prefix: str, dims: str) -> dict[str, int]:
    return {f"stride_{prefix}{dim}": 0 for dim in dims}
