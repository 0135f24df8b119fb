"""fastgpt: fused attention and KV-cache kernels for PyTorch, and a decoder that uses them."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

from fastgpt import startup

if startup.is_command():
    startup.watch()

import torch  # loads the libraries that the compiled operations link to

try:
    import_module("fastgpt._C")
except ImportError as error:
    from pathlib import Path

    folder = Path(__file__).parent
    build = "pip install --no-build-isolation -e ."
    others = sorted(path.name for path in folder.glob("_C.*"))
    if not isinstance(error, ModuleNotFoundError):
        reason = f"its compiled operations do not load with torch {torch.__version__} ({error}). Rebuild them: {build}"
    elif others:
        reason = f"its compiled operations in {folder} are for another Python ({', '.join(others)}). Rebuild them: {build}"
    else:
        reason = (
            f"Python found {folder}, which has no compiled operations (fastgpt._C). If it is the source folder and fastgpt is "
            f"installed elsewhere, run Python in another folder; or build the operations in the source folder: {build}"
        )
    raise ImportError(f"fastgpt cannot be imported: {reason}") from error

from fastgpt._C import OutOfPages
from fastgpt.cache.base import KVCache
from fastgpt.cache.contiguous import ContiguousCache
from fastgpt.cache.paged import PagedCache, PagePool
from fastgpt.cache.sliding import SlidingCache
from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation.decoding import decoding
from fastgpt.generation.generate import generate, generate_each, stream
from fastgpt.generation.many import Interrupted
from fastgpt.integrations.sdpa import scaled_dot_product_attention
from fastgpt.model.classifiers import SequenceClassifier, TokenClassifier
from fastgpt.model.config import EncoderConfig, EncoderDecoderConfig, GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder import Encoder
from fastgpt.model.encoder_decoder import EncoderDecoder
from fastgpt.model.inspection import run_with_cache
from fastgpt.ops.attention import attention, attention_reference, attention_varlen, attention_varlen_reference
from fastgpt.ops.attention_with_kv_cache import attention_with_kv_cache, attention_with_kv_cache_reference
from fastgpt.ops.explain import explain
from fastgpt.ops.kv_cache_update import (
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.ops.library import build_info
from fastgpt.ops.linear import linear, linear_reference
from fastgpt.ops.moe import moe, moe_reference
from fastgpt.ops.norm import norm, norm_reference
from fastgpt.ops.quantized_weight import Quantization, QuantizedWeight, quantize
from fastgpt.ops.route import route, route_reference

if TYPE_CHECKING:  # at run time in __getattr__, since it loads tokenizers
    from fastgpt.encoding.pipeline import embed
    from fastgpt.pipelines import pipeline

startup.unwatch()

__all__ = [
    "GPT",
    "SHIPPED_MODEL",
    "ContiguousCache",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPTConfig",
    "Interrupted",
    "KVCache",
    "OutOfPages",
    "PagePool",
    "PagedCache",
    "Quantization",
    "QuantizedWeight",
    "SequenceClassifier",
    "SlidingCache",
    "TokenClassifier",
    "attention",
    "attention_reference",
    "attention_varlen",
    "attention_varlen_reference",
    "attention_with_kv_cache",
    "attention_with_kv_cache_reference",
    "build_info",
    "decoding",
    "embed",
    "explain",
    "generate",
    "generate_each",
    "kv_cache_update",
    "kv_cache_update_reference",
    "linear",
    "linear_reference",
    "moe",
    "moe_reference",
    "norm",
    "norm_reference",
    "pipeline",
    "quantize",
    "rope_kv_cache_update",
    "rope_kv_cache_update_reference",
    "route",
    "route_reference",
    "run_with_cache",
    "scaled_dot_product_attention",
    "stream",
]


def __getattr__(name: str):
    if name == "pipeline":
        from fastgpt.pipelines import pipeline

        return pipeline
    if name == "embed":
        from fastgpt.encoding.pipeline import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
