"""Continuous batching (`generate_batch`, `transformers serve`) of transformers from 5.23 on.

Its paged cache gathers the keys and values of all sequences before each attention of a step. Ours stores the new ones and
leaves the rest to the kernels, which read the pages.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    PagedAttentionCache,
    cache,
    continuous_api,
    initialization,
    input_outputs,
)
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.modeling_utils import AttentionInterface

from fastgpt.integrations.paged import Step
from fastgpt.integrations.transformers.attention import DTYPES, attention
from fastgpt.ops.attention.checks import MAX_HEAD_DIM
from fastgpt.ops.kv_cache_update import kv_cache_update


class Pages(NamedTuple):
    """What the attention function of a layer gets instead of gathered keys and values."""

    step: Step
    k: torch.Tensor  # (num_pages, H_kv, page, D)
    v: torch.Tensor


class PagedCache(PagedAttentionCache):
    """transformers' paged cache, with pages that the kernels read."""

    def __init__(self, config: Any, continuous_batching_config: Any, *args, **options):
        for name in ("varlen_compile_config", "decode_compile_config"):
            if getattr(continuous_batching_config, name) is not None:
                raise ValueError(
                    f"{name}: expected None with fastgpt's attention, got {getattr(continuous_batching_config, name)}"
                )
        if any(continuous_batching_config.cuda_graph_booleans):
            raise ValueError("use_cuda_graph: expected False with fastgpt's attention, got True")
        super().__init__(config, continuous_batching_config, *args, **options)
        self._steps: dict[int, tuple[torch.Tensor, Step | None]] = {}  # of each allocator, with the cu_seq_lens_q they are for

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Stores keys and values (1, H_kv, total_q, D) and returns them; `kwargs` gets `pages`. Returns the gathered keys and
        values of all sequences, as transformers does, for chunks of prompts in layers with a sliding window."""
        allocator: Any = self.layer_to_allocator[layer_idx]
        bounds, table = kwargs["cu_seq_lens_q"], kwargs.get("block_table")
        held, step = self._steps.get(allocator.index, (None, None))
        if held is not bounds:
            step = self._step(allocator, kwargs)
            self._steps[allocator.index] = bounds, step
        if step is None:
            return super().update(key_states, value_states, layer_idx, kwargs)
        pools = FullAttentionCacheAllocator.get_cache_for_block_table(allocator, layer_idx)
        # Those view the keys and values of all layers as pages; a block has some of each layer.
        k_pages, v_pages = (x[:: allocator.block_physical_stride // x.shape[1]].transpose(1, 2) for x in pools)
        if table is not None:
            (group,) = step.paged
            new = (x.transpose(0, 2) for x in (key_states, value_states))  # (B, H_kv, 1, D)
            kv_cache_update(*new, k_pages, v_pages, group.lengths.unsqueeze(1) - 1, block_table=group.table)
        else:
            new = (x.squeeze(0).transpose(0, 1) for x in (key_states, value_states))
            allocator.update(*new, layer_idx, bounds[:0], kwargs["write_index"][allocator.index])  # reads nothing
        kwargs["pages"] = Pages(step, k_pages, v_pages)
        return key_states, value_states

    def _step(self, allocator, kwargs) -> Step | None:
        """The step over the pages of a group of layers; None if keys and values have to be gathered."""
        bounds, key_bounds = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][allocator.layer_type]
        queries, keys = bounds.diff().tolist(), key_bounds.diff().tolist()
        page, index, device = allocator.tokens_per_page, allocator.index, bounds.device
        if kwargs.get("block_table") is not None:
            blocks = kwargs["block_table"][index] // (allocator.block_physical_stride // page)
            return Step(queries, keys, blocks, page, device)
        read, write = kwargs["read_index"][index], kwargs["write_index"][index]
        if len(read) == 0:
            return Step(queries, keys, None, page, device)
        entries = key_bounds[:-1, None] + torch.arange(0, max(keys), page, device=device)
        tokens = read[entries.clamp(max=len(read) - 1)]  # the first of each page
        if hasattr(allocator, "sliding_window"):
            # Rings of the last tokens: chunks overwrite keys that they attend to. Once a ring is full, its pages come in any
            # order, so one that is not full must be the only one.
            window = allocator.sliding_window
            if max(queries) > 1 or (max(keys) == window and window > page and window % page):
                return None
            tokens = torch.where(tokens == allocator.sentinel_index, write.unsqueeze(1), tokens)  # the page of the new token
        return Step(queries, keys, (tokens // allocator.block_physical_stride).int(), page, device)


def serves(config: Any) -> bool:
    """Whether a model's attention is fastgpt's."""
    return AttentionInterface._global_mapping.get(config._attn_implementation) is attention


def _refuse(model) -> None:
    """Raises ValueError, which names what fastgpt cannot serve, before the first step."""
    config, name = model.config.get_text_config(), type(model).__name__
    heads, kv_heads, head_dim = config.num_attention_heads, cache.find_num_key_value_heads(config), cache.find_head_dim(config)
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name}: expected attention that goes through transformers' AttentionInterface")
    if model.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a dtype of {', '.join(map(str, DTYPES))}, got {model.dtype}")
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a model on a CPU or CUDA, got {model.device}")
    if head_dim > MAX_HEAD_DIM or heads % kv_heads:
        expected = f"head dims up to {MAX_HEAD_DIM} and a multiple of {kv_heads} heads"
        raise ValueError(f"{name}: expected {expected}, got a head dim of {head_dim} and {heads} heads")


def _wrappers() -> Iterator[tuple[Any, str, Callable]]:
    """(owner, name, function) of what transformers decides by the name of an attention implementation, and we for ours."""
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    asks_for_flash, needs_mask = cache.is_flash_attention_requested, input_outputs.attn_mask_is_needed
    ensure_decode_path = initialization.ensure_decode_fast_path_is_available
    create_cache = continuous_api.PagedAttentionCache

    def switch_attention(self, model, *args, **options):  # raises for names that it does not know
        return _refuse(model) if serves(model.config) else switch(self, model, *args, **options)

    def ensure_decode_path_is_available(config, cb_config, user_requested):  # turns block tables off, but for flash_attn's
        groups = initialization.group_layers_by_attn_type(config)
        with_tables = all(initialization.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in groups)
        if not serves(config) or not with_tables:
            ensure_decode_path(config, cb_config, user_requested)

    yield ContinuousBatchingManager, "switch_to_cb_friendly_attn", switch_attention
    yield initialization, "ensure_decode_fast_path_is_available", ensure_decode_path_is_available
    # These size the cache, and create masks (T, keys of all sequences).
    yield cache, "is_flash_attention_requested", lambda config: serves(config) or asks_for_flash(config)
    yield input_outputs, "attn_mask_is_needed", lambda config: not serves(config) and needs_mask(config)
    yield (
        continuous_api,
        "PagedAttentionCache",
        lambda config, *args, **options: (PagedCache if serves(config) else create_cache)(config, *args, **options),
    )


_replaced: list[tuple[Any, str, Any]] = []  # owner, name, what was there before


def install() -> None:
    """Lets transformers' continuous batching accept and use fastgpt's attention. A second call has no effect."""
    if not _replaced:
        for owner, name, function in [*_wrappers()]:
            _replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, function)


def uninstall() -> None:
    while _replaced:
        setattr(*_replaced.pop())
