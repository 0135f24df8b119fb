"""fastgpt's attention, cache, linear layers and norms for models of transformers 5.

    import fastgpt.integrations.transformers as ft
    ft.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastgpt")

`ft.Cache(model.config)` is a KV cache for `generate`; `ft.optimize(model)` also serves linear layers and norms, and can quantize
them; `ft.record()` counts which implementations serve the calls of a model.
"""

try:
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401
except ImportError as error:
    if (error.name or "").partition(".")[0] != "transformers":  # a dependency of transformers
        raise
    raise ImportError(
        'fastgpt.integrations.transformers needs transformers 5, which is not installed: pip install "transformers>=5"'
    ) from error

from fastgpt.integrations.transformers.attention import attention
from fastgpt.integrations.transformers.cache import Cache
from fastgpt.integrations.transformers.masks import mask
from fastgpt.integrations.transformers.optimize import optimize, restore
from fastgpt.integrations.transformers.recording import record
from fastgpt.integrations.transformers.registration import register, unregister

__all__ = ["Cache", "attention", "mask", "optimize", "record", "register", "restore", "unregister"]
