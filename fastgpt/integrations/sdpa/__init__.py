"""PyTorch's scaled_dot_product_attention served by fastgpt's kernels: as a function, and as a switch for all its callers.

Calls that the kernels do not support are served by PyTorch's function; `fastgpt.explain` gives the reason.
"""

from fastgpt.integrations.sdpa.dispatcher_hook import enabled, remove_hook
from fastgpt.integrations.sdpa.function import explain, scaled_dot_product_attention

__all__ = ["enabled", "explain", "remove_hook", "scaled_dot_product_attention"]
