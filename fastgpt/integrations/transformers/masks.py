"""The mask function, which transformers calls before the first layer and whose result it passes to all layers.

Its own creates (B, 1, T, S) booleans as soon as a batch is padded or a window is full. Ours keeps the components, which
`fastgpt.attention` takes as arguments: causal, a window, and (B, 1, 1, S) booleans for padding.
"""

import functools
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import masking_utils
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.import_utils import is_tracing

from fastgpt.integrations.transformers.deferred import Deferred


class Pattern(NamedTuple):
    """Which keys a query attends to, apart from padding."""

    causal: bool
    window: int | None = None  # with causal
    segments: torch.Tensor | None = None  # (B, T): index of the packed sequence of each token, ascending along T


class Mask(Deferred):
    """A lazy (B, 1, T, S) boolean mask; True attends.

    keys: number of leading keys that any query attends to; if causal, the last query has the position of the last of them.
    options: arguments of `fastgpt.attention` over those keys.
    segments: see Pattern.
    """

    keys: int
    options: dict
    segments: torch.Tensor
    call: dict

    def _compute(self):
        return masking_utils.sdpa_mask(**self.call | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    @functools.cached_property
    def packing(self) -> tuple[torch.Tensor, int]:
        """cu_seqlens (segments + 1,) int32 of the B · T tokens in one row, and the length of the longest segment."""
        begins = torch.ones_like(self.segments, dtype=torch.bool)
        begins[:, 1:] = self.segments.diff() != 0
        starts = begins.flatten().nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([begins.numel()])]).int()
        return bounds, int(bounds.diff().max())


def mask(**call) -> torch.Tensor | None:
    """The mask function of fastgpt's attention, with the keyword arguments of transformers' `sdpa_mask`.

    Returns: the mask of `sdpa_mask` as a lazy `Mask`; None if that would return None, or for one query that attends to all keys.
        A model whose attention does not go through transformers' AttentionInterface gets the mask of eager attention.
    """
    config = call.get("config")
    if config is not None and not _calls_interface(type(config)):
        return masking_utils.eager_mask(**call)
    pattern = _pattern_of(call)
    return masking_utils.sdpa_mask(**call) if pattern is None else _mask_of(pattern, call)


def _mask_of(pattern: Pattern, call: dict) -> torch.Tensor | None:
    B, T, S = call["batch_size"], call["q_length"], call["kv_length"]
    call = call | {"q_offset": int(call["q_offset"])}  # a static cache counts on in its tensor
    first, padding = call.get("kv_offset", 0), call.get("attention_mask")
    keys = call["q_offset"] + T - first if pattern.causal else S
    if not T <= keys <= S:
        return masking_utils.sdpa_mask(**call)
    if padding is not None:
        call["attention_mask"] = padding = padding.to(torch.bool, copy=True)  # whose owner may change it before it is read
        padding = F.pad(padding, (0, max(0, first + S - padding.shape[1])))[:, first : first + S]
        padding = None if padding[:, :keys].all() else padding.view(B, 1, 1, S)
    window = pattern.window if pattern.window is not None and pattern.window < keys else None

    if not pattern.causal:
        if padding is None:
            return None if call.get("allow_is_bidirectional_skip") else masking_utils.sdpa_mask(**call)
    elif pattern.segments is None:
        if not call.get("allow_is_causal_skip", True):
            return masking_utils.sdpa_mask(**call)
        if padding is None and window is None and keys == (T if T > 1 else S):
            return None  # which lets query i of several see the keys 0 to i, and a single one all
        if T == 1 and window is None and keys == S:
            return padding
    options = {"causal": pattern.causal, "window": window, "mask": None if padding is None else padding[..., :keys]}
    device = call.get("device", "cpu")
    return Mask((B, 1, T, S), torch.bool, device, call=call, keys=keys, options=options, segments=pattern.segments)


def _pattern_of(call: dict) -> Pattern | None:
    """What the mask function of a call does, or None where that, or an offset or padding that it depends on, is not known."""
    offset, padding = call.get("q_offset"), call.get("attention_mask")
    if offset is None or call.get("use_vmap") or is_tracing(offset) or is_tracing(padding):  # no offset before 5.3
        return None
    # A static cache has its offset in a tensor, so as not to synchronize; the mask of one query is short anyway.
    if isinstance(offset, torch.Tensor) and call["q_length"] == 1 or padding is not None and padding.dim() != 2:
        return None
    return _recognized(call.get("mask_function", masking_utils.causal_mask_function))


def _recognized(function) -> Pattern | None:
    """transformers composes its mask functions of closures: we know them by their code and what they close over."""
    match _opened(function):
        case "causal_mask_function", _:
            return Pattern(causal=True)
        case "bidirectional_mask_function", _:
            return Pattern(causal=False)
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:  # positions count from 0 in each segment
            return _recognized(inner)
        case "and_masks", {"mask_functions": (first, second)}:
            match _opened(first), _opened(second):
                case ("sliding_window_overlay", {"sliding_window": int(window)}), ("causal_mask_function", _):
                    return Pattern(causal=True, window=window)
                case _, ("packed_sequence_mask_function", {"packed_sequence_mask": segments}):
                    inner = _recognized(first)
                    return inner._replace(segments=segments) if inner is not None and inner.causal else None
    return None


def _opened(function) -> tuple[str, dict] | None:
    """Who made a mask function, and the values of what it closes over."""
    name = _MAKERS.get(getattr(function, "__code__", None))
    if name is None:
        return None
    cells = function.__closure__ or ()
    return name, {variable: cell.cell_contents for variable, cell in zip(function.__code__.co_freevars, cells)}


def _makers() -> Iterator[tuple[CodeType, str]]:
    for name in ("causal_mask_function", "bidirectional_mask_function"):
        yield getattr(masking_utils, name).__code__, name
    for name, *arguments in (
        ("and_masks",), ("sliding_window_overlay", 1), ("packed_sequence_mask_function", None),
        ("remap_positions_for_packed_sequence", None, None),
    ):  # fmt: skip
        if hasattr(masking_utils, name):
            yield getattr(masking_utils, name)(*arguments).__code__, name


_MAKERS = dict(_makers())


@torch._dynamo.assume_constant_result
def _calls_interface(config: type) -> bool:
    """Whether attention of the models with such a config goes through the AttentionInterface."""
    return _models_call_interface(config)


@functools.cache
def _models_call_interface(config: Any) -> bool:
    models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
    if not models or any(model._can_set_attn_implementation() for model in models):
        return True
    name = config.model_type or config.__name__
    warnings.warn(
        f"{name}: its attention does not go through transformers' AttentionInterface: fastgpt does not serve it", stacklevel=2
    )
    return False


def _subclasses(of: type):
    for subclass in of.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
