"""Other implementations of attention: PyTorch's, and on a GPU flash-attn's and FlashInfer's if they are installed.

A candidate takes example arguments of `fastgpt.attention` and a window, and returns a function of such arguments; compiling and
planning happen there, once per shape. A candidate that does not support the arguments raises, or its function does.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import DEVICE
from fastgpt import attention_reference

SCORES = 1 << (26 if DEVICE == "cpu" else 29)  # the most scores that the reference may materialize


def reference(window=None, **example):
    if scores_of_a_query(**example) * example["q"].shape[2] > SCORES:
        raise MemoryError("its scores do not fit into memory")
    return partial(attention_reference, window=window)


def sdpa(q, k, v, window=None, backend=None, **cache):
    refuse(cache)
    options = {"enable_gqa": q.shape[1] > k.shape[1]}
    if window is None:
        options["is_causal"] = q.shape[2] > 1
    else:
        position = torch.arange(q.shape[2], device=q.device)
        behind = position[:, None] - position
        options["attn_mask"] = (behind >= 0) & (behind < window)
    if backend is None:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)
    if backend == SDPBackend.MATH:
        reference(q=q, k=k)  # it materializes the scores, too

    def restricted(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return restricted


def flex(q, k, v, window=None, **cache):
    refuse(cache)
    if q.requires_grad and q.device.type == "cpu":
        raise NotImplementedError("on a CPU it has no backward pass")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        return (i >= j) if window is None else (i >= j) & (i - j < window)

    T = q.shape[2]
    options = {"enable_gqa": q.shape[1] > k.shape[1]}
    if T > 1:
        options["block_mask"] = create_block_mask(visible, None, None, T, T, device=q.device)
    torch.compiler.reset()  # otherwise it stops compiling after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, **options)


def flash_attn(q, k, v, window=None, **cache):
    refuse(cache, "it takes pages of 256 tokens only" if set(cache) == {"block_table"} else None)
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    if q.shape[2] == 1:
        function = flash_attn_with_kvcache
    else:
        function = partial(flash_attn_func, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
    return lambda q, k, v: function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def flashinfer(q, k, v, window=None, block_table=None, **cache):
    refuse(cache)
    if q.requires_grad:
        raise NotImplementedError("it has no backward pass")
    import flashinfer

    B, H, T, D = q.shape
    H_kv, page = k.shape[1:3]
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    dtypes = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    if T > 1:  # the batch is packed sequences
        window_left = -1 if window is None else window - 1
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(starts * T, starts * T, H, H_kv, D, causal=True, window_left=window_left, **dtypes)

        def packed(x):
            return x.transpose(1, 2).flatten(0, 1)

        return lambda q, k, v: wrapper.run(packed(q), packed(k), packed(v)).view(B, T, H, D).transpose(1, 2)

    pages = starts[:-1, None] if block_table is None else block_table  # a contiguous cache: a page for each sequence
    last = torch.full((B,), page, dtype=torch.int32, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=H >= 4 * H_kv)
    wrapper.plan(starts * pages.shape[1], pages.flatten(), last, H, H_kv, D, page, **dtypes)
    return lambda q, k, v, block_table=None: wrapper.run(q[:, :, 0], (k, v)).unsqueeze(2)


CANDIDATES = {"reference": reference, "FlexAttention": flex}
if DEVICE == "cpu":
    CANDIDATES["SDPA"] = sdpa
else:
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        CANDIDATES[f"SDPA, {backend.name.removesuffix('_ATTENTION').lower()}"] = partial(sdpa, backend=backend)
    CANDIDATES |= {"flash-attn": flash_attn, "FlashInfer": flashinfer}


def peers(
    ours: Callable, example: dict, *, window=None, of: Callable = lambda function: function, without: dict | None = None
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The candidates that give the same results as ours, and the reasons why the others are absent.

    Args:
        ours: a function of arguments like the example's.
        example: the arguments.
        window: attention window.
        of: applied to each candidate's function before it is compared, such as to compute gradients.
        without: name -> reason for candidates that are skipped.

    Returns: name -> function, and name -> reason.
    Raises: AssertionError if ours differs from the reference.
    """
    expected = ours(**example)
    present, absent = {}, dict(without or {})
    for name, candidate in CANDIDATES.items():
        if name in absent:
            continue
        try:
            function = of(candidate(**example, window=window))
            compare(function(**example), expected)
            present[name] = function
        except Exception as error:  # a peer that does not support the case is no failure
            if name == "reference" and isinstance(error, AssertionError):
                raise
            absent[name] = next(filter(None, str(error).splitlines()), type(error).__name__)
    return present, absent


def compare(actual, expected):
    """Raises AssertionError unless tensors agree, up to a few units in the last place of the largest number."""
    for x, y in zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]:
        tolerance = max(5e-5, 4 * torch.finfo(x.dtype).eps) * y.abs().max().item()
        torch.testing.assert_close(x.double(), y.double(), atol=tolerance, rtol=0)


def check(out, q, k, v, window=None, **cache):
    """Compares with the reference in float64, for as many of the last queries as take about a second."""
    last = max(1, (1 << 24) // scores_of_a_query(q, k, **cache))
    q, k, v = (x if x.itemsize == 1 else x.double() for x in (q[:, :, -last:], k, v))
    compare(out[:, :, -last:], attention_reference(q, k, v, window=window, **cache))


def scores_of_a_query(q, k, block_table=None, **_) -> int:
    return q.shape[0] * q.shape[1] * k.shape[2] * (1 if block_table is None else block_table.shape[1])


def refuse(cache: dict, reason: str | None = None):
    if cache:
        raise NotImplementedError(reason or f"it takes no {' or '.join(cache)}")
