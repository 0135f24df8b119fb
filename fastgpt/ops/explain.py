"""`fastgpt.explain`: which implementation a call would use, and why not the others."""

import inspect
from collections.abc import Callable

from fastgpt.ops import attention, attention_with_kv_cache, kv_cache_update, linear, norm

# Integrations add theirs.
OPERATIONS = {
    attention.attention: attention.explain,
    attention.attention_varlen: attention.explain_varlen,
    attention_with_kv_cache.attention_with_kv_cache: attention_with_kv_cache.explain,
    kv_cache_update.kv_cache_update: kv_cache_update.explain,
    kv_cache_update.rope_kv_cache_update: kv_cache_update.explain_rope,
    linear.linear: linear.explain,
    norm.norm: norm.explain,
}


def explain(operation: Callable, *args, **kwargs) -> dict[str, str]:
    """Says how `operation(*args, **kwargs)` would be served, without running it.

    Args:
        operation: fastgpt.attention, attention_varlen, attention_with_kv_cache, kv_cache_update, rope_kv_cache_update, linear,
            norm or scaled_dot_product_attention; the rest is what it would be called with. Or fastgpt.decoding, with a
            model and a cache: how a decode step runs.

    Returns: implementation -> "chosen", "available" (it could, but another comes first), or why it cannot.
    Raises: what the call itself would raise for bad input.
    """
    if operation not in OPERATIONS:
        known = ", ".join(f"fastgpt.{function.__qualname__}" for function in OPERATIONS)
        raise ValueError(f"operation: expected one of {known}, got {operation!r}")
    answer = OPERATIONS[operation]
    try:
        for function in (operation, answer):
            inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = f"fastgpt.{operation.__qualname__}"
        expected = f"{name} and the arguments of a call, as in fastgpt.explain({name}, ...)"
        raise TypeError(f"operation: expected {expected}: {error}") from None
    return answer(*args, **kwargs)
