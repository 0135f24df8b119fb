"""The classes that vLLM asks a backend for: what it supports, what it prepares for a step, and the attention of a layer."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from fastgpt.integrations.paged import Step
from fastgpt.ops.attention.checks import KERNEL_DTYPES, MAX_HEAD_DIM
from fastgpt.ops.kv_cache_update import kv_cache_update

EIGHT_BIT = {"int8_per_token_head": torch.int8, "fp8_per_token_head": torch.float8_e4m3fn}


class Backend(AttentionBackend):
    """fastgpt's kernels over vLLM's pages."""

    forward_includes_kv_cache_update = False
    supported_dtypes = [*KERNEL_DTYPES]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", *EIGHT_BIT]

    @staticmethod
    def get_name() -> str:  # of a member of vLLM's enum
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["Attention"]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type["MetadataBuilder"]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple:
        return (KVCacheLayout.LBHNC,)  # each layer: (num_pages, H_kv, page, 2 D)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # they move pages, and the scales of 8-bit ones are beside them

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


@dataclass
class Metadata(AttentionMetadata):
    num_actual_tokens: int
    step: Step


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        for name, used in (
            ("decode context parallelism", parallel.decode_context_parallel_size > 1),
            ("prefill context parallelism", parallel.prefill_context_parallel_size > 1),
            ("prefixes of images with attention to later tokens", model.is_mm_prefix_lm),
            ("reference sliding windows", model.rswa_window is not None),
            ("KV connectors", vllm_config.kv_transfer_config is not None),
        ):
            if used:
                raise _refusal(name)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise _refusal("attention that is not causal")
        queries = common.query_start_loc_cpu.diff().tolist()
        step = Step(
            queries, common.seq_lens.tolist(), common.block_table_tensor, self.kv_cache_spec.block_size, common.seq_lens.device
        )  # fmt: skip
        return Metadata(common.num_actual_tokens, step)


class Attention(AttentionImpl[Metadata]):
    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: torch.Tensor | None = None, **others,
    ):  # fmt: skip
        if attn_type != AttentionType.DECODER:
            raise _refusal(f"attention of type {AttentionType(attn_type).value}")
        if head_size > MAX_HEAD_DIM:
            raise _refusal(f"head_size {head_size}, which may be up to {MAX_HEAD_DIM}")
        if kv_cache_dtype not in Backend.supported_kv_cache_dtypes:
            raise _refusal(f"kv_cache_dtype {kv_cache_dtype!r}, which may be {', '.join(Backend.supported_kv_cache_dtypes)}")
        if kv_sharing_target_layer_name is not None:
            raise _refusal("layers that share the cache of another")
        if given := [name for name, value in others.items() if value is not None]:
            raise _refusal(", ".join(given))
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.kv_cache_dtype, self.eight_bit = kv_cache_dtype, EIGHT_BIT.get(kv_cache_dtype)
        self.options: dict[str, Any] = {
            "scale": self.scale, "window": sliding_window, "softcap": logits_soft_cap or None,
            "alibi_slopes": None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32),
        }  # fmt: skip
        self.sinks = sinks  # whose values are loaded later
        self._k_scale_cache = self._v_scale_cache = None  # vLLM resets these between profiling and serving

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:  # fmt: skip
        """Stores keys and values (tokens, H_kv, D) in the slots of the pool, of which negative ones are skipped."""
        tokens = len(slot_mapping)
        new = (x[:tokens].transpose(0, 1).unsqueeze(0) for x in (key, value))  # (1, H_kv, tokens, D)
        k_pages, v_pages, scales = self._pages(kv_cache)
        table = _all_pages(kv_cache.shape[0], kv_cache.device)
        kv_cache_update(*new, k_pages, v_pages, slot_mapping.unsqueeze(0), block_table=table, **scales)

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
        attn_metadata: Metadata | None, output: torch.Tensor, output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of queries (tokens, H, D) to the pool, into output (tokens, H, D_v)."""
        if attn_metadata is None:  # while vLLM profiles memory
            return output
        if output_scale is not None or output_block_scale is not None:
            raise _refusal("quantized outputs")
        if self.options["alibi_slopes"] is not None:
            self.options["alibi_slopes"] = self.options["alibi_slopes"].to(query.device)
        n = attn_metadata.num_actual_tokens
        k_pages, v_pages, scales = self._pages(kv_cache)
        sinks = None if self.sinks is None else self.sinks.float()
        output[:n] = attn_metadata.step.attend(
            query[:n], key[:n], value[:n], k_pages, v_pages, sinks=sinks, **scales, **self.options
        )  # fmt: skip
        return output

    def _pages(self, kv_cache) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Pools of pages of keys and values (num_pages, H_kv, page, head dim), which follow each other within each page and head
        of vLLM's, and the scales of 8-bit ones, which are in memory of their own."""
        num_pages, heads, page, content = kv_cache.shape
        k_pages, v_pages = kv_cache.view(num_pages, heads, page * content).split(
            [page * self.head_size, page * (content - self.head_size)], dim=2
        )
        k_pages, v_pages = k_pages.unflatten(2, (page, -1)), v_pages.unflatten(2, (page, -1))
        if self.eight_bit is None:
            return k_pages, v_pages, {}
        if self._k_scale_cache is None or self._k_scale_cache.shape != (num_pages, heads, page):
            self._k_scale_cache, self._v_scale_cache = torch.zeros(2, num_pages, heads, page, device=kv_cache.device)
        scales = {"k_scale": self._k_scale_cache, "v_scale": self._v_scale_cache}
        return k_pages.view(self.eight_bit), v_pages.view(self.eight_bit), scales


@functools.lru_cache(2)
def _all_pages(num_pages: int, device: torch.device) -> torch.Tensor:
    """A block table (1, num_pages) by which the pool is one sequence."""
    return torch.arange(num_pages, dtype=torch.int32, device=device).unsqueeze(0)


def _refusal(what: str) -> ValueError:
    return ValueError(f"fastgpt's backend does not serve {what}: unset FASTGPT_VLLM to use vLLM's own")
