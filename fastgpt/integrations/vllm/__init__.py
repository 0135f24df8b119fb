"""fastgpt as an attention backend of vLLM 0.32, which loads `plugin` in each of its processes.

    FASTGPT_VLLM=1 vllm serve MODEL                               # on a CPU
    FASTGPT_VLLM=1 vllm serve MODEL --attention-backend CUSTOM    # on CUDA

Without FASTGPT_VLLM=1 nothing changes.
"""

import os

BACKEND = "fastgpt.integrations.vllm.backend.Backend"


def plugin() -> None:
    """The entry point of `vllm.general_plugins`: registers the backend if the environment has FASTGPT_VLLM=1.

    Raises: ValueError if FASTGPT_VLLM is neither 0 nor 1.
    """
    setting = os.environ.get("FASTGPT_VLLM") or "0"
    if setting not in ("0", "1"):
        raise ValueError(f"FASTGPT_VLLM: expected 0 or 1, got {setting!r}")
    if setting == "1":
        register()


def register() -> None:
    """Registers fastgpt with vLLM in this process, for models that are made from then on: in place of CPU_ATTN, the only
    backend that vLLM takes on a CPU, and as CUSTOM, which `attention_backend="CUSTOM"` selects elsewhere."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        register_backend(backend, BACKEND)
    _cached_get_attn_backend.cache_clear()


def unregister() -> None:
    """Undoes `register`, for models that are made from then on."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        backend.clear_override()
    _cached_get_attn_backend.cache_clear()
