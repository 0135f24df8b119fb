"""`fastgpt.explain`: which implementation would serve a call, and why not the others."""

import inspect
from collections.abc import Callable

from fastgpt.checks import shown
from fastgpt.ops import attention, attention_with_kv_cache, kv_cache_update, linear, moe, norm, route

# Operation -> its explanation. Generation and integrations add theirs.
OPERATIONS = {
    attention.attention: attention.explain,
    attention.attention_varlen: attention.explain_varlen,
    attention_with_kv_cache.attention_with_kv_cache: attention_with_kv_cache.explain,
    kv_cache_update.kv_cache_update: kv_cache_update.explain,
    kv_cache_update.rope_kv_cache_update: kv_cache_update.explain_rope,
    linear.linear: linear.explain,
    moe.moe: moe.explain,
    route.route: route.explain,
    norm.norm: norm.explain,
}


def explain(operation: Callable, *args, **kwargs) -> dict[str, str]:
    """Explains which implementation would serve `operation(*args, **kwargs)`, without running it.

    Args:
        operation: fastgpt.attention, attention_varlen, attention_with_kv_cache, kv_cache_update, rope_kv_cache_update, linear,
            moe, norm, route or scaled_dot_product_attention; or fastgpt.decoding, with a model and a cache: how a decode step runs.
        args, kwargs: the arguments of the call.

    Returns: a dict from implementation to "chosen", "available" (another one comes first, or is required by impl), or the reason
        why it cannot.
    Raises: TypeError, ValueError that the call itself would raise for bad input, or for an impl that cannot serve it; ValueError
        for another operation.

    >>> q, k, v = torch.randn(3, 1, 4, 8, 64)
    >>> explain(fastgpt.attention, q, k, v)["cpp"]
    'chosen'
    """
    if operation not in OPERATIONS:
        known = ", ".join(f"fastgpt.{function.__qualname__}" for function in OPERATIONS)
        raise ValueError(f"operation: expected one of {known}, got {shown(operation)}")
    explanation = OPERATIONS[operation]
    try:
        for function in (operation, explanation):
            inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = f"fastgpt.{operation.__qualname__}"
        expected = f"{name} and the arguments of a call, as in fastgpt.explain({name}, ...)"
        raise TypeError(f"operation: expected {expected}: {error}") from None
    return explanation(*args, **kwargs)
