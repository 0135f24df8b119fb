"""The previous tokens of each row, for logits processors that depend on them."""

from collections.abc import Iterator, Sequence

import torch


class History:
    """The tokens of each row so far, updated in place; `reset` starts it.

    tokens: (B, longest prompt + steps) int64, padded on the left: all rows end in the same column. -1 for padding and for
        tokens to come.
    """

    def __init__(self, prompts: Sequence[torch.Tensor], steps: int):
        self.longest = max(map(len, prompts))
        self.tokens = prompts[0].new_empty(len(prompts), self.longest + steps)

    def reset(self, prompts: Sequence[torch.Tensor]) -> None:
        self.rows: dict[int, list[int]] = {}  # by the length of their prompts
        for row, prompt in enumerate(prompts):
            self.rows.setdefault(len(prompt), []).append(row)
        self.tokens.fill_(-1)
        for row, prompt in zip(self.tokens, prompts):
            row[self.longest - len(prompt) : self.longest] = prompt

    def append(self, token: torch.Tensor, step: torch.Tensor) -> None:
        """Records the tokens (B,) of a step (1,)."""
        self.tokens.index_copy_(1, step + self.longest, token.unsqueeze(1))

    def by_prompt_length(self, steps: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """After this number of steps: rows whose prompts have the same length, and their tokens (rows, T), without padding."""
        for length, rows in self.rows.items():
            tokens = self.tokens[:, self.longest - length : self.longest + steps]
            yield rows, tokens if len(rows) == len(tokens) else tokens[rows]


class NgramBlocker:
    """Excludes tokens that would repeat an n-gram of their row; `reset` starts it.

    overlap: (B, columns of the history) int32: for each column, the number of tokens directly before it that equal the last
        tokens of the row, in order; any number >= n - 1 if there are more than n - 1.
    """

    def __init__(self, history: History, n: int):
        self.tokens, self.longest = history.tokens, history.longest
        self.needed = min(n - 1, self.tokens.shape[1])
        self.overlap = torch.empty(self.tokens.shape, dtype=torch.int32, device=self.tokens.device)

    def reset(self) -> None:
        """For the prompts that the history holds."""
        tokens, end = self.tokens, self.longest
        self.overlap.zero_()
        equal = torch.ones(len(tokens), end, dtype=torch.bool, device=tokens.device)
        for back in range(min(self.needed, end - 1)):
            last = tokens[:, end - 1 - back, None]
            equal[:, : back + 1] = False  # too few tokens before them
            equal[:, back + 1 :] &= (tokens[:, : end - 1 - back] == last) & (last >= 0)
            if not equal.any():
                break
            self.overlap[:, :end] += equal

    def append(self, token: torch.Tensor) -> None:
        """Records the last tokens (B,), which the history already holds."""
        longer = (self.overlap[:, :-1] + 1) * (self.tokens[:, :-1] == token.unsqueeze(1))
        self.overlap[:, 1:].copy_(longer)

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        forbidden = torch.where(self.overlap >= self.needed, self.tokens, -1)
        limits = torch.where(forbidden >= 0, float("-inf"), float("inf")).to(logits.dtype)
        return logits.scatter_reduce(1, forbidden.clamp(min=0), limits, "amin")
