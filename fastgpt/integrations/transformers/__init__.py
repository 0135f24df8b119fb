"""fastgpt's attention in the models of the transformers library, version 5.

    import fastgpt.integrations.transformers as ft
    ft.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastgpt")

`ft.Cache(model.config)` is a cache for `generate` that goes with it; `ft.record()` tells what serves a model's calls.
"""

import threading

try:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    if (error.name or "").partition(".")[0] != "transformers":  # something that transformers needs
        raise
    raise ImportError(
        'fastgpt.integrations.transformers needs transformers 5, which is not installed: pip install "transformers>=5"'
    ) from error

from fastgpt.integrations.transformers.attention import attention, record
from fastgpt.integrations.transformers.cache import Cache
from fastgpt.integrations.transformers.masks import mask

__all__ = ["Cache", "attention", "mask", "record", "register", "unregister"]

_lock = threading.Lock()
_replaced = {}  # (interface, name) -> the function that was there before, or None


def register(name: str = "fastgpt") -> None:
    """Makes `attn_implementation=name` choose fastgpt's attention, in `from_pretrained`, `from_config` and
    `set_attn_implementation`. Registering what is registered changes nothing.

    With the name "sdpa" it serves every model that uses PyTorch's attention through transformers, those loaded already, too.
    """
    functions = {
        (AttentionInterface, name): attention,
        (AttentionMaskInterface, name): mask,  # without which padding would be lost
        (AttentionInterface, f"paged|{name}"): attention,  # continuous batching before transformers 5.23, which has no mask
    }
    with _lock:
        for (interface, key), function in functions.items():
            if (interface, key) not in _replaced:
                _replaced[interface, key] = interface._global_mapping.get(key)
                interface.register(key, function)


def unregister(name: str | None = None) -> None:
    """Restores what was there before `register`, for a name or for all."""
    with _lock:
        for interface, key in list(_replaced):
            if name is None or key.removeprefix("paged|") == name:
                before = _replaced.pop((interface, key))
                if before is None:
                    interface._global_mapping.pop(key, None)
                else:
                    interface.register(key, before)
