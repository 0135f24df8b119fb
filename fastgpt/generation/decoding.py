"""A decode step, from one token of each sequence to the next logits, replayed without Python where results stay the same."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastgpt.cache.base import KVCache
from fastgpt.checks import require_tensor, shown
from fastgpt.generation import replay
from fastgpt.model.decoder import GPT
from fastgpt.model.inputs import require_decoder
from fastgpt.model.moe import MoE
from fastgpt.ops.explain import OPERATIONS
from fastgpt.ops.implementations import (
    explain_call,
    inference_unsupported_reason,
    runs_elsewhere,
    triton_inference_unsupported_reason,
)
from fastgpt.ops.library import OneThread
from fastgpt.ops.linear import FEW_ROWS_BF16, FEW_ROWS_QUANTIZED, MAX_ROWS_CPU
from fastgpt.ops.matrix_product import FASTEST, KERNEL
from fastgpt.ops.quantized_weight import QuantizedWeight

ONE_THREAD = OneThread()


class DecodeStep(Protocol):
    """What `decoding` returns: the next token of each sequence, (B,) int64 -> its logits (B, V)."""

    recording: replay.Recording

    def __call__(self, token: torch.Tensor, /) -> torch.Tensor: ...


def decoding(
    model: GPT, cache: KVCache, choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    recording: replay.Recording | None = None,
) -> DecodeStep:  # fmt: skip
    """Returns a function for decode steps: the next token of each sequence (B,) int64, which it appends to the cache -> the
    logits (B, V) that follow.

    On a CPU, its first call is recorded and later ones replay it without Python; on a GPU, its second call is captured in a
    CUDA graph. So the result of a call may be overwritten by the next one. Where a model cannot be recorded, such as one with
    hooks, its modules are called at every step; a model that is modified later is recorded again, or then called.
    `fastgpt.explain(fastgpt.decoding, model, cache)` says which applies, and why.

    Args:
        model: the decoder.
        cache: a cache of it, with the keys and values of the tokens before.
        choose: a function of the logits, whose result is returned instead, such as the next token. It is part of the CUDA
            graph, and must follow the rules of `fastgpt.generation.replay.CudaGraphReplay`.
        recording: the attribute `recording` of an earlier result for the same cache and `choose`, which is then reused.

    Raises: TypeError, ValueError, naming the argument; the function raises RuntimeError if a capture fails.
    """
    _require(model, cache)
    if not (choose is None or callable(choose)):
        raise TypeError(f"choose: expected a function of logits or None, got {shown(choose)}")
    if not isinstance(recording, replay.Recording | None):
        raise TypeError(f"recording: expected the attribute of an earlier result or None, got {shown(recording)}")

    def step(x, tables):
        return model.uncapped_logits(model.run_blocks(x, cache, tables=tables)[:, -1])

    def chosen(logits):
        return logits if choose is None else choose(logits)

    def whole(token, tables):
        return chosen(model.softcap_logits(step(model.embed_reserved(token.unsqueeze(1), cache, tables), tables)))

    def replayed(token):
        model.check(column(token), cache)
        cache.reserve(1)
        return graph(token, model.position_tables(token, cache))

    def around_plan(token):
        x = model.embed(column(token), cache)
        return chosen(model.softcap_logits(plan(x, model.position_tables(x, cache))))

    def recorded(token):
        if not plan.is_recorded:
            return around_plan(token)
        with ONE_THREAD:  # what PyTorch does around the plan is little, and its threads would spin beside the plan's
            return around_plan(token)

    if replay.has_graphs(cache.lengths.device):
        graph = _recording(model, recording, whole, replay.CudaGraphReplay, functools.partial(graph_refused, model, cache))
        return _with_recording(replayed, graph)
    plan = _recording(model, recording, step, replay.CpuReplay)
    return _with_recording(recorded, plan)


class Passes:
    """Passes of up to `most` new tokens of each sequence, for speculation: each token's logits have the bits of a decode step.

    On a CPU that is so for plain modules without autocast; on a GPU they may differ by rounding. Each number of tokens is
    recorded or captured on its own, as the step of `decoding`.

    Args:
        model: the decoder.
        cache: a cache of it, with the keys and values of the tokens before.

    most: at least 1.
    """

    def __init__(self, model: GPT, cache: KVCache):
        _require(model, cache)
        self.model: Any
        self.recordings: dict[tuple[int, bool], replay.Recording] = {}  # by number of tokens, and whether they are as_steps
        self.most = most_steps(model, cache)
        self.resume(model, cache)

    def __call__(self, ids: torch.Tensor, new: list[int]) -> torch.Tensor:
        """ids (B, T) int64, padded on the left with -1, new[b] of them in row b -> logits (B, T, V) before the soft cap, which
        the next call may overwrite. `cache.truncate` takes tokens back."""
        model, cache, T = self.model, self.cache, ids.shape[1]
        as_steps = T > 1 or not all(new)  # or else it is a plain decode step
        if not (as_steps or self.graphs):
            recording = self.recordings.get((1, False)) or self._new(1, False)
            with self.around():
                x = model.embed(ids, cache)
                return recording(x, model.position_tables(x, cache))
        model.check(ids, cache, new)
        cache.reserve(T, new)
        recording = self.recordings.get((T, as_steps)) or self._new(T, as_steps)
        tables = model.position_tables(ids, cache)
        if self.graphs:
            return recording(ids, tables)
        with self.around():
            return recording(model.embed_reserved(ids, cache, tables, as_steps), tables)

    def around(self) -> contextlib.AbstractContextManager:
        """A context manager for what is done between passes: as `decoding`, it leaves PyTorch one thread beside recorded ones."""
        recorded = not self.graphs and any(recording.is_recorded for recording in self.recordings.values())
        return ONE_THREAD if recorded else contextlib.nullcontext()

    def _new(self, T: int, as_steps: bool) -> replay.Recording:
        record = replay.CudaGraphReplay if self.graphs else replay.CpuReplay
        recording = replay.Recording(self.model, self._step(as_steps), record, self._refuses(T))
        self.recordings[T, as_steps] = recording
        return recording

    def _step(self, as_steps: bool) -> Callable:
        model, cache, graphs = self.model, self.cache, self.graphs

        def step(x, tables):
            x = model.embed_reserved(x, cache, tables, as_steps) if graphs else x
            return model.uncapped_logits(model.run_blocks(x, cache, tables=tables))

        return step

    def _refuses(self, T: int) -> Callable | None:
        return functools.partial(graph_refused, self.model, self.cache, T) if self.graphs else None

    def holds(self) -> bool:
        """As `Recording.holds`, of all."""
        return all(recording.holds() for recording in self.recordings.values())

    def let_go(self) -> None:
        """Lets go of the model until `resume`, as `Recording.let_go`."""
        self.model = None
        for recording in self.recordings.values():
            recording.let_go()

    def resume(self, model: GPT, cache: KVCache) -> None:
        """With the arguments that this was made with."""
        self.model, self.cache, self.graphs = model, cache, replay.has_graphs(cache.lengths.device)
        for (T, as_steps), recording in self.recordings.items():
            recording.resume(model, self._step(as_steps), self._refuses(T))


def most_steps(model: GPT, cache: KVCache) -> int:
    """The most new tokens of each sequence in a pass whose products have the bits of a step."""
    if not cache.lengths.is_cpu:
        return cache.max_steps
    quantized = any(isinstance(weight, QuantizedWeight) for weight in model.parameters())
    bounds = [FEW_ROWS_QUANTIZED] * quantized + [FEW_ROWS_BF16] * (model.key_dtype is torch.bfloat16) + [MAX_ROWS_CPU]
    rows = next((bound for bound in bounds if cache.batch_size <= bound), 0)
    return min(max(rows // cache.batch_size, 1), cache.max_steps)


def _with_recording(function: Any, recording: replay.Recording) -> DecodeStep:
    function.recording = recording
    return function


def column(token: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1), the ids of a pass."""
    if not isinstance(token, torch.Tensor) or token.dim() != 1:
        require_tensor("token", token, 1)
    return token.unsqueeze(1)


def _require(model: GPT, cache: KVCache) -> None:
    require_decoder(model)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache from `new_cache`, got {type(cache).__name__}")


def _recording(model: GPT, earlier: replay.Recording | None, function, record: type, refuses=None) -> replay.Recording:
    if earlier is None or earlier.record is not record:
        return replay.Recording(model, function, record, refuses)
    earlier.resume(model, function, refuses)
    return earlier


def graph_refused(model: GPT, cache: KVCache, num_tokens: int = 1) -> str | None:
    """Why a decode step over this cache, or a pass `as_steps` of several tokens, cannot be captured in a CUDA graph, or None:
    modules are not plain (fastgpt/model/fusion.py), or no kernel serves their dtype or device, and a reference would synchronize
    with it."""
    weight = model.first_weight
    if weight.is_cuda and (reason := triton_inference_unsupported_reason(weight, weight=weight)) is not None:
        return f"the Triton kernels do not serve it: {reason}"
    if (reason := replay.modules_refuse(model)) is not None:
        return reason
    if (name := next((name for name, module in model.named_modules() if getattr(module, "waits", False)), None)) is not None:
        return f"{name} waits for the device"
    rows = cache.batch_size * num_tokens
    for name, module in model.named_modules():
        if isinstance(module, MoE) and (reason := module.graph_refused(rows)) is not None:
            return f"{name}: {reason}"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedWeight) and parameter.packing.block_type:
            return f"{name} is stored in blocks that no kernel reads"
    first: Any = model.blocks[0] if model.blocks else None
    heads = first.attention.num_heads if first is not None else 0  # this process's share
    return cache.attend_waits(heads, cache.dtype if cache.casts else weight.dtype, num_tokens)


def _explain(model: GPT, cache: KVCache) -> dict[str, str]:
    """How the steps of `decoding(model, cache)` would run: as a CUDA graph, as recorded operations on a CPU, or eagerly:
    "chosen", "available", or why not."""
    _require(model, cache)
    model.check(torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.first_weight.device), cache)
    with torch.no_grad():
        return explain_call(DECODING, model, cache)


def _cuda_graph_refuses(model: GPT, cache: KVCache) -> str | None:
    if not replay.has_graphs(cache.lengths.device):
        return runs_elsewhere("CUDA", "the model", cache.lengths.device)
    return graph_refused(model, cache)


def _cpu_replay_refuses(model: GPT, cache: KVCache) -> str | None:
    if not cache.lengths.is_cpu:
        return runs_elsewhere("CPU", "the model", cache.lengths.device)
    if cache.batch_size > MAX_ROWS_CPU and FASTEST.get(model.first_weight.dtype) != KERNEL:
        return f"it takes up to {MAX_ROWS_CPU} sequences, and the cache has {cache.batch_size}"
    return replay.modules_refuse(model) or inference_unsupported_reason(model.first_weight)


DECODING = {"cuda_graph": _cuda_graph_refuses, "cpu_replay": _cpu_replay_refuses, "eager": lambda model, cache: None}
OPERATIONS[decoding] = _explain
