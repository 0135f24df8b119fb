"""The tokens of each row so far, for rules that depend on them."""

from collections.abc import Iterator, Sequence

import torch


class History:
    """The tokens of each row so far, in place, after `begin`.

    tokens: (B, longest prompt + steps) int64; all rows end in the same column. -1 before a row's first, and to come.
    """

    def __init__(self, prompts: Sequence[torch.Tensor], steps: int):
        self.longest = max(map(len, prompts))
        self.tokens = prompts[0].new_empty(len(prompts), self.longest + steps)

    def begin(self, prompts: Sequence[torch.Tensor]) -> None:
        self.rows: dict[int, list[int]] = {}  # by the length of their prompts
        for row, prompt in enumerate(prompts):
            self.rows.setdefault(len(prompt), []).append(row)
        self.tokens.fill_(-1)
        for row, prompt in zip(self.tokens, prompts):
            row[self.longest - len(prompt) : self.longest] = prompt

    def append(self, token: torch.Tensor, step: torch.Tensor) -> None:
        """Notes the tokens (B,) of a step (1,)."""
        self.tokens.index_copy_(1, step + self.longest, token.unsqueeze(1))

    def alike(self, steps: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """After so many steps: rows whose prompts are equally long, and their tokens (rows, T), without padding."""
        for length, rows in self.rows.items():
            tokens = self.tokens[:, self.longest - length : self.longest + steps]
            yield rows, tokens if len(rows) == len(tokens) else tokens[rows]


class NgramBlocker:
    """Forbids tokens that would complete an n-gram which its row has already, after `begin`.

    overlap: (B, columns of the history) int32: of each column, how many tokens right before it are, one by one, those that
        the row ends with; of more than n - 1, any number from there.
    """

    def __init__(self, history: History, n: int):
        self.tokens, self.longest = history.tokens, history.longest
        self.needed = min(n - 1, self.tokens.shape[1])
        self.overlap = torch.empty(self.tokens.shape, dtype=torch.int32, device=self.tokens.device)

    def begin(self) -> None:
        """Of the prompts, which are in the history."""
        tokens, end = self.tokens, self.longest
        self.overlap.zero_()
        alike = torch.ones(len(tokens), end, dtype=torch.bool, device=tokens.device)
        for back in range(min(self.needed, end - 1)):
            last = tokens[:, end - 1 - back, None]
            alike[:, : back + 1] = False  # too few tokens before them
            alike[:, back + 1 :] &= (tokens[:, : end - 1 - back] == last) & (last >= 0)
            if not alike.any():
                break
            self.overlap[:, :end] += alike

    def append(self, token: torch.Tensor) -> None:
        """Rows end with these tokens (B,) now, which are in the history."""
        longer = (self.overlap[:, :-1] + 1) * (self.tokens[:, :-1] == token.unsqueeze(1))
        self.overlap[:, 1:].copy_(longer)

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        forbidden = torch.where(self.overlap >= self.needed, self.tokens, -1)
        limits = torch.where(forbidden >= 0, float("-inf"), float("inf")).to(logits.dtype)
        return logits.scatter_reduce(1, forbidden.clamp(min=0), limits, "amin")
