"""`register` and `unregister`: the names under which transformers finds fastgpt's attention."""

import importlib.util
import threading

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fastgpt.integrations.transformers.attention import attention
from fastgpt.integrations.transformers.masks import mask

_CONTINUOUS_BATCHING = importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is not None
if _CONTINUOUS_BATCHING:
    from fastgpt.integrations.transformers import continuous

_lock = threading.Lock()
_replaced = {}  # (interface, name) -> the function that was there before, or None


def register(name: str = "fastgpt") -> None:
    """Registers fastgpt's attention with transformers, for `attn_implementation=name` in `from_pretrained`, `from_config` and
    `set_attn_implementation`. Registering a name twice has no effect.

    Args:
        name: "fastgpt", or "sdpa" to serve all models that use PyTorch's attention through transformers, including those that
            are already loaded.
    """
    functions = {
        (AttentionInterface, name): attention,
        (AttentionMaskInterface, name): mask,  # without it, padding would be ignored
        (AttentionInterface, f"paged|{name}"): attention,  # continuous batching before transformers 5.23, without a mask
    }
    with _lock:
        if _CONTINUOUS_BATCHING:
            continuous.install()
        for (interface, key), function in functions.items():
            if (interface, key) not in _replaced:
                _replaced[interface, key] = interface._global_mapping.get(key)
                interface.register(key, function)


def unregister(name: str | None = None) -> None:
    """Undoes `register`, for one name or for all."""
    with _lock:
        for interface, key in list(_replaced):
            if name is None or key.removeprefix("paged|") == name:
                before = _replaced.pop((interface, key))
                if before is None:
                    interface._global_mapping.pop(key, None)
                else:
                    interface.register(key, before)
        if not _replaced and _CONTINUOUS_BATCHING:
            continuous.uninstall()
