"""Attention of the steps of a serving engine: sequences of different lengths, whose keys and values lie in pages."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch

from fastgpt.ops.attention import attention, attention_varlen


class _Group(NamedTuple):
    """Sequences that one call over the pages serves."""

    rows: slice | torch.Tensor  # their tokens in the packed queries
    queries: int  # of each sequence
    lengths: torch.Tensor  # (n,) int32, keys of each sequence
    table: torch.Tensor  # (n, pages) int32


class Step:
    """The calls that serve one step of an engine, for all layers that share a block table.

    Sequences with one query each share a call over the pages; sequences whose keys are all new share a call of
    `attention_varlen`, which does not read the pages; each other sequence has a call over the pages of its own.

    Args:
        queries: the number of new tokens of each sequence, which lie one after the other; may be 0.
        keys: the number of keys of each sequence, including those of the new tokens.
        block_table: (B, pages) int32 on the device of the queries, of which entries past the keys are not read. None if all
            keys are new.
        page: tokens of a page.
        device: that of the queries.
    """

    def __init__(
        self, queries: list[int], keys: list[int], block_table: torch.Tensor | None, page: int, device: torch.device
    ):  # fmt: skip
        starts = [0, *accumulate(queries)]

        def rows_of(members: list[int]) -> slice | torch.Tensor:
            return _joined([slice(starts[b], starts[b + 1]) for b in members], device)

        def group(members: list[int]) -> _Group:
            lengths = [keys[b] for b in members]
            table = block_table[_joined([slice(b, b + 1) for b in members], device), : -(-max(lengths) // page)]
            lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
            return _Group(rows_of(members), queries[members[0]], lengths, table)

        single, fresh, others = [], [], []
        for b, (new, length) in enumerate(zip(queries, keys)):
            if new == 1 and block_table is not None:
                single.append(b)
            elif new == length > 0:
                fresh.append(b)
            elif new:
                others.append(b)
        self.paged = [group(members) for members in (single, *([b] for b in others)) if members]
        self.fresh = None
        if fresh:
            bounds = torch.tensor([0, *accumulate(queries[b] for b in fresh)], dtype=torch.int32, device=device)
            self.fresh = rows_of(fresh), bounds, max(queries[b] for b in fresh)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *,
        k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None, note: Callable | None = None, **options,
    ) -> torch.Tensor:  # fmt: skip
        """Causal attention of the new tokens, whose keys and values are already stored in the pages.

        Args:
            q: (total_q, H, D).
            k, v: keys and values (total_q, H_kv, D) and (total_q, H_kv, D_v) of the new tokens.
            k_pages, v_pages: pools (num_pages, H_kv, page, D) and (num_pages, H_kv, page, D_v).
            k_scale, v_scale: (num_pages, H_kv, page) of 8-bit pools.
            note: called with each operation and its arguments before it is.
            options: scale, window, softcap, alibi_slopes and sinks of `fastgpt.attention`.

        Returns: (total_q, H, D_v).
        """
        out = q.new_empty(*q.shape[:2], v.shape[2])
        if self.fresh is not None:
            rows, bounds, longest = self.fresh
            packed = q[rows], k[rows], v[rows], bounds, bounds, longest, longest
            if note is not None:
                note(attention_varlen, *packed, **options)
            out[rows] = attention_varlen(*packed, **options)
        for rows, queries, lengths, table in self.paged:
            grouped = q[rows].unflatten(0, (len(lengths), queries)).transpose(1, 2)  # (n, H, queries, D)
            paged = {"kv_lengths": lengths, "block_table": table, "k_scale": k_scale, "v_scale": v_scale, **options}
            if note is not None:
                note(attention, grouped, k_pages, v_pages, **paged)
            out[rows] = attention(grouped, k_pages, v_pages, **paged).transpose(1, 2).flatten(0, 1)
        return out


def _joined(slices: list[slice], device: torch.device) -> slice | torch.Tensor:
    """One slice if they follow each other, else the indices."""
    if all(one.stop == following.start for one, following in zip(slices, slices[1:])):
        return slice(slices[0].start, slices[-1].stop)
    return torch.cat([torch.arange(one.start, one.stop) for one in slices]).to(device)
