"""The interface of a cache for a forward pass without one."""

from collections.abc import Callable
from typing import Any

import torch

from fastgpt.cache.base import least
from fastgpt.ops.attention import attention
from fastgpt.ops.derivatives import derivatives_possible
from fastgpt.ops.kv_cache_update import rope_kv_cache_update, rope_reference


def rotated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k after rotary embedding, and v. Where no derivatives are needed, keys and values are stored as in a cache: the
    operation that does both takes a tenth of the time of a rotation by PyTorch."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or derivatives_possible() or not q.dtype == k.dtype == v.dtype:
        return rope_reference(q, positions, *rotation), rope_reference(k, positions, *rotation), v
    k_stored, v_stored = torch.empty_like(k), torch.empty_like(v)
    q = rope_kv_cache_update(q, k, v, k_stored, v_stored, positions, *rotation)
    return q, k_stored, v_stored


class Uncached:
    """Takes the place of a KVCache in a forward pass without one: attention over the tokens of the pass.

    Args:
        window: attention window in tokens, the token itself included, on both sides if not causal; default: full attention.
        causal: False lets tokens attend to later ones as well, as in an encoder.
        lengths: (B,) int32, the number of tokens of each sequence; the columns past it are padding, which no token attends to.
            Default: T.
    """

    expected_length = 0
    encoder_kv: Any = None  # see KVCache
    position_bias: torch.Tensor | None = None

    def __init__(
        self,
        window: int | None = None,
        device: torch.device | str | None = None,
        *,
        causal: bool = True,
        lengths: torch.Tensor | None = None,
    ):
        self.window, self.device, self.causal, self.lengths = window, device, causal, lengths

    def extend(self, num_tokens: int, new: None = None) -> torch.Tensor:
        """Positions of the tokens, (num_tokens,)."""
        self.positions, self.length = torch.arange(num_tokens, device=self.device), num_tokens
        return self.positions

    def add_bias(self, bias: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """As `KVCache.add_bias`."""
        self.position_bias = bias(self.positions, self.length)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        window: int | None = None,
        last_only: bool = False,
        **options,
    ) -> torch.Tensor:
        """Attention over k and v, rotated if there is a rotation. Arguments and result are those of `KVCache.attend`."""
        if rotation is not None:
            q, k, v = rotated(q, k, v, self.positions.expand(q.shape[0], -1), rotation)
        visible = self.visible(window, last_only)
        if self.position_bias is not None:
            visible["bias"] = self.position_bias[:, :, -1:] if last_only else self.position_bias
        return self.attend_rotated(layer, q[:, :, -1:] if last_only else q, k, v, **visible, **options)

    def attend_rotated(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        return attention(q, k, v, **options)  # type: ignore[return-value]  # without lse

    def visible(self, window: int | None, last_only: bool = False) -> dict:
        """The arguments of `attention` that say which keys a query attends to. Causal attention never reaches padding on the right.
        A window is on both sides of a token if it is not causal."""
        window = least(window, self.window)
        if self.causal:
            return {"causal": True, "window": window}
        options = {"causal": False, "kv_lengths": self.lengths}
        if window is None or window >= self.length:
            return options
        near = (self.positions.unsqueeze(1) - self.positions).abs() < window  # (T, T)
        return options | {"mask": near[-1:] if last_only else near}
