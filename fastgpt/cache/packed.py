"""The interface of a cache for a pass over packed sequences: one after the other, without padding."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from fastgpt.cache.uncached import rotated
from fastgpt.ops.attention import attention, attention_varlen


class Packed:
    """Takes the place of a KVCache in a pass of an encoder over packed sequences: tokens attend to all of their own sequence.

    Args:
        lengths: B integers, at least 1, the number of tokens of each sequence; N in all.

    positions: (N,) int64, of the tokens in their sequences.
    """

    encoder_kv: Any = None  # an encoder has no cross-attention
    position_bias: torch.Tensor | None = None  # (1, H, longest, longest), see `add_bias`

    def __init__(self, lengths: Sequence[int], device: torch.device | str | None = None):
        self.lengths, self.longest = list(lengths), max(lengths)
        self.bounds = _bounds(lengths, device)
        self.rows = torch.arange(sum(lengths), device=device)  # (N,)
        self.positions = self.rows - _repeated(self.bounds[:-1].long(), lengths)
        self.parts: dict[int, tuple] = {}  # by window

    def add_bias(self, bias: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """As `KVCache.add_bias`."""
        self.position_bias = bias(torch.arange(self.longest, device=self.rows.device), self.longest)

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
        """Attention of q (1, H, N, D) over k, v (1, H_kv, N, D): (1, H, N, D).

        Args:
            rotation: cos and sin (N, R/2) of the tokens, with which q and k are rotated.
            window: the tokens that are seen on either side, the token itself included in both; default: all.
            options: those of `attention_varlen`.
        """
        if rotation is not None:
            q, k, v = rotated(q, k, v, self.rows.unsqueeze(0), rotation)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # (N, H, D), (N, H_kv, D) twice
        if self.position_bias is not None:
            out = self._attend_padded(q, k, v, window, options)
        elif window is None or window >= self.longest:
            bounds, longest = self.bounds, self.longest
            out = attention_varlen(q, k, v, bounds, bounds, longest, longest, causal=False, **options)  # type: ignore[assignment]  # without lse
        else:
            out = self._attend_within(window, q, k, v, options)
        return out.transpose(0, 1).unsqueeze(0)

    def _attend_padded(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: dict
    ) -> torch.Tensor:
        """Attention with the bias, which is one for all sequences where each begins at 0: of rows that are padded to the longest."""
        B, T = len(self.lengths), self.longest
        place = self.positions + _repeated(T * torch.arange(B, device=self.rows.device), self.lengths)

        def padded(x):  # (N, heads, D) -> (B, heads, T, D)
            return x.new_zeros(B * T, *x.shape[1:]).index_copy(0, place, x).view(B, T, *x.shape[1:]).transpose(1, 2)

        if window is not None and window < T:
            near = torch.arange(T, device=place.device)
            options = options | {"mask": (near.unsqueeze(1) - near).abs() < window}
        out = attention(
            padded(q), padded(k), padded(v), causal=False, bias=self.position_bias, kv_lengths=self.bounds.diff(), **options
        )
        return out.transpose(1, 2).flatten(0, 1)[place]  # type: ignore[union-attr]  # without lse

    def _attend_within(self, window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        """Attention to keys j with |i - j| < window, in two calls, whose windows end at the query's position or later.

        The last window - 1 tokens of a sequence see all that follow, as without a causal mask; q is aligned to the last key. The
        n others, aligned so as well, are window - 1 positions further than they are: causal attention, in a window of twice the
        size, ends where theirs does. n=3 of 5 tokens and the 2 others, window=3:

            1 1 1 0 0
            1 1 1 1 0
            1 1 1 1 1
            0 1 1 1 1
            0 0 1 1 1
        """
        if window not in self.parts:
            self.parts[window] = self._parts(window)
        (first, bounds, longest), (last, bounds_of_last, longest_of_last), order = self.parts[window]
        rows = q[first], k, v, bounds, self.bounds, longest, self.longest
        outs = [attention_varlen(*rows, causal=True, window=2 * window - 1, **options)]
        if window > 1:
            rows = q[last], k, v, bounds_of_last, self.bounds, longest_of_last, self.longest
            outs.append(attention_varlen(*rows, causal=False, window=window, **options))
        return torch.cat(outs)[order]  # type: ignore[arg-type]  # without lse

    def _parts(self, window: int) -> tuple:
        """The rows, bounds and greatest length of the tokens of both calls, and where each token is among them."""
        of_last = [min(n, window - 1) for n in self.lengths]
        of_first = [n - m for n, m in zip(self.lengths, of_last)]
        device, parts, begins = self.rows.device, [], self.bounds[:-1].long()
        for begin, counts in ((begins, of_first), (begins + torch.tensor(of_first, device=device), of_last)):
            bounds = _bounds(counts, device)
            rows = torch.arange(sum(counts), device=device) + _repeated(begin - bounds[:-1], counts)
            parts.append((rows, bounds, max(counts)))
        return *parts, torch.cat([rows for rows, *_ in parts]).argsort()


def _repeated(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each of x (B,) as often as counts say: (sum of counts,)."""
    return x.repeat_interleave(torch.tensor(counts, device=x.device), output_size=sum(counts))  # a size that nothing waits for


def _bounds(lengths: Sequence[int], device: torch.device | str | None) -> torch.Tensor:
    """Where packed sequences begin and end, (B + 1,) int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
