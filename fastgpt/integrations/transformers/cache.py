"""A KV cache for transformers' `generate`, which appends in place; transformers' DynamicCache copies everything at each token."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fastgpt import huge_pages
from fastgpt.checks import require_integer, require_tensor
from fastgpt.integrations.transformers.deferred import EightBit
from fastgpt.ops.derivatives import refuse_transforms_of_cache, through_cache
from fastgpt.ops.kv_cache_update import kv_cache_update
from fastgpt.ops.quantization import QUANTIZED_DTYPES, as_bytes

CROPS_TO_LENGTH = Version(transformers.__version__) < Version("5.16")  # `crop` took a positive length
ROOM = 256  # rows that are allocated beyond the first tokens


class Layer(DynamicLayer):
    """Keys and values of a layer in storage (B, H_kv, rows, head dim), whose first `length` rows are tokens.

    Storage doubles when it is full, or has max_cache_len rows from the start. The model gets views of it or, if it is quantized,
    `EightBit` tensors. Gradients flow to the keys and values of the current call, not to those of earlier calls: if these
    required gradients, the backward pass raises RuntimeError.

    keys and values (B, H_kv, `length`, head dim) can be assigned, which copies them into storage. If the batch size, number of
    tokens or device changes, both must be assigned, one right after the other.
    """

    def __init__(self, max_cache_len: int | None, cache_dtype: torch.dtype | None):
        # Not DynamicLayer's, which makes attributes of what are properties here.
        self.max_cache_len, self.cache_dtype = max_cache_len, cache_dtype
        self.storage = {}  # by argument of kv_cache_update: k_cache, v_cache and, if quantized, k_scale, v_scale
        self.length = 0
        self.required_gradients = False  # whether any stored key or value did
        self.is_initialized = False
        self.assigned = {}  # keys or values whose counterpart has not been assigned yet

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes sizes, dtype and device from the first keys (B, H_kv, T, D) and values (B, H_kv, T, D_v)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        storage = {}
        for name, x in (("k", key_states), ("v", value_states)):
            storage[f"{name}_cache"] = x.new_empty(*x.shape[:2], 0, x.shape[3], dtype=self.cache_dtype or self.dtype)
            if self.cache_dtype is not None:
                storage[f"{name}_scale"] = x.new_empty(*x.shape[:2], 0, dtype=torch.float32)
        if [_but_rows(x) for x in storage.values()] != [_but_rows(x) for x in self.storage.values()]:  # what `reset` left
            self.storage = storage
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor | None:
        return self._stored("keys")

    @keys.setter
    def keys(self, x: torch.Tensor | None) -> None:
        self._assign("keys", x)

    @property
    def values(self) -> torch.Tensor | None:
        return self._stored("values")

    @values.setter
    def values(self, x: torch.Tensor | None) -> None:
        self._assign("values", x)

    @property
    def _kept(self) -> int:
        """The number of rows in storage that `keys` and `values` return."""
        return self.length

    def _stored(self, name: str) -> torch.Tensor | None:
        if name in self.assigned or not self.is_initialized:
            return self.assigned.get(name)
        return self._last(self._kept)[name == "values"]

    def _assign(self, name: str, x: torch.Tensor | None) -> None:
        if x is None:
            return self.reset()
        require_tensor(name, x, 4)
        self.assigned[name] = x
        k, v = self.keys, self.values
        if k is None or v is None or k.shape[:3] != v.shape[:3] or k.device != v.device:
            return  # the other one has not been assigned yet
        self.required_gradients |= k.requires_grad or v.requires_grad
        self.assigned, self.storage, self.length = {}, {}, 0
        self.lazy_initialization(k, v)
        self._store(k.detach(), v.detach())

    def _require_pair(self) -> None:
        for name, x in self.assigned.items():
            other = "values" if name == "keys" else "keys"
            raise ValueError(
                f"{other}: expected an assignment of shape {tuple(x.shape[:3])}, as {name} were assigned, got none"
            )

    @property
    def _rows(self) -> int:
        return self.storage["k_cache"].shape[2]

    def _last(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last n keys and values."""
        first = self.length - n
        k, v = self.storage["k_cache"].narrow(2, first, n), self.storage["v_cache"].narrow(2, first, n)
        if self.cache_dtype is None:
            return k, v
        scales = self.storage["k_scale"].narrow(2, first, n), self.storage["v_scale"].narrow(2, first, n)
        k, v = (EightBit(x.shape, self.dtype, x.device, codes=x, scale=scale) for x, scale in zip((k, v), scales))
        return k, v

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_pair()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append(key_states, value_states, self.length)

    def _append(self, key_states, value_states, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens; returns the keys and values of the last `past` older tokens and of the new ones."""
        if torch.is_grad_enabled():  # a copy, with gradients for new tokens, that later in-place writes do not change
            joined = self._joined(past, key_states, value_states)
            self.required_gradients |= key_states.requires_grad or value_states.requires_grad
            self._store(key_states.detach(), value_states.detach())
            return joined
        self._store(key_states, value_states)
        return self._last(past + key_states.shape[2])

    def _joined(self, past: int, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        if not past:
            return key_states, value_states

        def join(*new):
            return tuple(torch.cat(pair, dim=2) for pair in zip(self._last(past), new))

        if not self.required_gradients:
            return join(key_states, value_states)
        requiring = torch.empty(0, requires_grad=True)  # also if the new tokens do not require gradients
        return through_cache(lambda k, v, requiring: join(k, v), key_states, value_states, requiring)

    def _store(self, k, v) -> None:
        T = k.shape[2]
        self._make_room(T)
        if k.dtype != self.dtype or v.dtype != self.dtype or k.stride(3) != 1 or v.stride(3) != 1:
            k, v = k.to(self.dtype).contiguous(), v.to(self.dtype).contiguous()
        # Not the cached positions for fake tensors, nor under graph capture, since the graph reads them after the cache drops them.
        shared = type(k) is torch.Tensor and not (k.is_cuda and torch.cuda.is_current_stream_capturing())
        positions = _positions if shared else _positions.__wrapped__
        kv_cache_update(k, v, positions=positions(k.shape[0], self.length, T, k.device), **self.storage)
        self.length += T

    def _make_room(self, new: int) -> None:
        needed, rows = self.length + new, self._rows
        if needed <= rows:
            return
        if self.max_cache_len is None:
            self._move(max(2 * rows, needed + ROOM))
        elif needed <= self.max_cache_len:
            self._move(self.max_cache_len)
        else:
            limit = f"at most {self.max_cache_len} tokens (max_cache_len)"
            raise ValueError(f"cache: expected {limit}, got {self.length} stored + {new} new")

    def _move(self, rows: int, index: torch.Tensor | None = None) -> None:
        """Moves tokens to new storage of `rows` rows, for all sequences or those in `index` (N,)."""
        for name, x in self.storage.items():
            stored = as_bytes(x)[:, :, : self.length]
            stored = stored if index is None else stored.index_select(0, index.to(x.device))
            with torch.inference_mode(False):  # the cache may outlive inference mode
                moved = huge_pages.empty((len(stored), x.shape[1], rows, *x.shape[3:]), dtype=x.dtype, device=x.device)
            as_bytes(moved)[:, :, : self.length] = stored
            self.storage[name] = moved

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last n tokens, for tokens_to_remove = -n. Before transformers 5.16, a positive number of tokens to keep."""
        self.length -= self._cropped(tokens_to_remove)

    def _cropped(self, tokens_to_remove: int) -> int:
        """The number of tokens that `crop` removes."""
        self._require_pair()
        require_integer("tokens_to_remove", tokens_to_remove)
        have = self.get_seq_length()
        removed = max(0, have - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if tokens_to_remove > 0 and not CROPS_TO_LENGTH:
            raise ValueError(f"tokens_to_remove: expected -n to remove n tokens, got {tokens_to_remove}")
        if removed > have and self.is_initialized:  # layers that share the keys of others have nothing to remove
            raise ValueError(f"tokens_to_remove: expected at least {-have}, for the {have} tokens in the cache, got {-removed}")
        return min(removed, have)

    def reset(self) -> None:
        self.length, self.is_initialized, self.assigned, self.required_gradients = 0, False, {}, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._require_pair()
        if self.length:
            for x in map(as_bytes, self.storage.values()):
                x[:, :, : self.length] = x[:, :, : self.length].index_select(0, beam_idx.to(x.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_pair()
        if self.length:
            self._move(self._rows, torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence | slice) -> None:
        """Keeps these sequences of the batch; indices: integers or booleans, in a tensor or a sequence, or a slice."""
        self._require_pair()
        if self.length:
            indices = indices.cpu() if isinstance(indices, torch.Tensor) else indices
            self._move(self._rows, torch.arange(len(self.keys))[indices, ...].view(-1))


class SlidingLayer(Layer, DynamicSlidingWindowLayer):
    """Keys and values of a layer with a sliding window. Storage has up to twice `sliding_window` rows: when it is full, the
    tokens inside the window move to its beginning, which is one row per new token on average.

    cumulative_length: tokens so far, of which the storage has the last `length`.
    """

    def __init__(self, sliding_window: int, cache_dtype: torch.dtype | None):
        super().__init__(None, cache_dtype)
        self.sliding_window, self.cumulative_length = sliding_window, 0
        self.record_past, self.uncropped = False, 0  # tokens that the next `crop` may take back

    @property
    def _kept(self):
        return min(self.length, self.sliding_window - 1 + self.uncropped)

    def _assign(self, name, x):
        super()._assign(name, x)
        if not self.assigned:
            self.uncropped = max(0, self.length - self.sliding_window + 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_pair()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        T, past = key_states.shape[2], min(self.length, self.sliding_window - 1)
        if T <= self.sliding_window or self.record_past:
            seen = self._append(key_states, value_states, past)
        else:  # only the end of so many will be seen again
            seen = self._joined(past, key_states, value_states)
            self.required_gradients = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
            self.length = 0
            self._store(*(x.detach()[:, :, T - self.sliding_window + 1 :] for x in (key_states, value_states)))
        self.cumulative_length += T
        self.uncropped += T if self.record_past else 0
        return seen

    def _make_room(self, new):
        rows, most = self._rows, 2 * self.sliding_window
        if self.length + new <= rows:
            return
        if self.length + new <= most:
            return self._move(min(most, max(2 * rows, self.length + new + ROOM)))
        keep = min(self.length, self.sliding_window - 1 + self.uncropped)
        for x in map(as_bytes, self.storage.values()):
            x[:, :, :keep] = x[:, :, self.length - keep : self.length].clone()
        self.length = keep
        if keep + new > rows:
            self._move(most if keep + new <= most else max(2 * rows, keep + new + ROOM))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        removed, have = self._cropped(tokens_to_remove), self._kept
        left = self.cumulative_length - removed
        if have - removed < min(left, self.sliding_window - 1):
            raise RuntimeError(
                f"tokens_to_remove: expected at most {have - self.sliding_window + 1} tokens, since a layer with a window of "
                f"{self.sliding_window} has {have} (more after activate_past_recording), got {removed}"
            )
        self.length, self.cumulative_length, self.uncropped = self.length - removed, left, 0

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = self.uncropped = 0


class Cache(DynamicCache):
    """A KV cache for transformers' `generate`, or a model, passed as `cache` (before transformers 5.24, `past_key_values`).

    It works with any attention implementation: fastgpt's reads 8-bit rows directly, others get them dequantized. Layers without
    keys and values, and special kinds of layers, keep transformers' own cache. A model with cross-attention takes two caches, in
    an EncoderDecoderCache.

    No gradients flow through stored keys and values: the backward pass raises RuntimeError if tokens of an earlier pass required
    gradients (with `DynamicCache` it does not). Forward-mode derivatives and transforms of torch.func raise immediately.

    Args:
        config: of the model.
        max_cache_len: the maximum number of tokens, allocated from the start; default: storage grows. Layers with a sliding window allocate
            what the window needs in any case.
        cache_dtype: torch.int8 or torch.float8_e4m3fn to quantize rows of keys and values, see `fastgpt.kv_cache_update`;
            default: the dtype of keys and values.

    Raises: TypeError, ValueError, naming the argument; `generate` raises ValueError beyond max_cache_len tokens.
    """

    def __init__(self, config: Any, *, max_cache_len: int | None = None, cache_dtype: torch.dtype | None = None):
        max_cache_len = require_integer("max_cache_len", max_cache_len, least=1, optional=True)
        if cache_dtype not in (None, *QUANTIZED_DTYPES):
            raise TypeError(f"cache_dtype: expected {' or '.join(map(str, QUANTIZED_DTYPES))} or None, got {cache_dtype}")
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = Layer(max_cache_len, cache_dtype)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[i] = SlidingLayer(layer.sliding_window, cache_dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        refuse_transforms_of_cache()
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or not, without layers that keep transformers' own cache."""
        return sum(x.nbytes for layer in self.layers if isinstance(layer, Layer) for x in layer.storage.values())


@functools.lru_cache(maxsize=8)  # the same in all layers of a pass
def _positions(B: int, first: int, T: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(first, first + T, dtype=torch.int32, device=device).expand(B, T)


def _but_rows(x: torch.Tensor) -> tuple:
    return x.shape[:2], x.shape[3:], x.dtype, x.device
