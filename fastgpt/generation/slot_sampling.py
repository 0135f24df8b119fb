"""Sampling for rows that are at steps of their own, in slots of a batch that rows join and leave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgpt.generation.sampling import Sampler, draw, most_likely


@dataclass(eq=False)
class Answer:
    """One row: a prompt, and what is generated after it.

    index: among all rows of the call.
    prompt: (T,) int64, on the CPU.
    most: new tokens, unless it ends before.
    uniforms: a list with the number of each step to sample by; None is greedy decoding.
    tokens, logprobs: the new ones, and with return_logprobs their log-probabilities.
    sampler: of its own, where rules depend on its history.
    beginning: of `Beginnings`, the sequence that holds its first tokens.
    done: whether it has ended.
    """

    index: int
    prompt: torch.Tensor
    most: int
    uniforms: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampler: Sampler | None = None
    beginning: int | None = None
    done: bool = False

    def ids(self) -> torch.Tensor:
        """Prompt and new tokens, (T,) int64."""
        return torch.cat([self.prompt, self.prompt.new_tensor(self.tokens)]) if self.tokens else self.prompt


class SlotSampler(Sampler):
    """Chooses the next token of each row as a `Sampler` of that row alone would.

    Rules that depend on the order of a row's tokens (no_repeat_ngram_size, logits_processors) are left to a `Sampler` of each row,
    which costs Python for each; all others are applied to all rows at once, without a device sync.

    Args:
        slots: the most rows.
        like: a tensor on the device.
        eos, logprobs, rules: as of `Sampler`.
    """

    def __init__(self, slots: int, vocab_size: int, like: torch.Tensor, *, eos: Sequence[int], logprobs: bool, **rules):
        self.arguments = {"eos": eos, "logprobs": logprobs, **rules}
        self.vocab_size, self.sampled, self.wants_logprobs = vocab_size, rules["temperature"] != 0, logprobs
        self.apart = bool(rules["no_repeat_ngram_size"] or rules["logits_processors"])
        # What depends on the number of steps is a row's own here.
        super().__init__([like.new_zeros(1, dtype=torch.int64)] * slots, 1, vocab_size, eos=eos, **rules)

    def join(self, slot: int, row: Answer) -> None:
        """A row takes a slot, with the tokens that it has."""
        if self.seen is not None:
            self.seen[slot].zero_()
            self.seen[slot, row.ids().to(self.seen.device)] = True
        if self.apart and row.sampler is None:
            uniforms, prompt = None, row.prompt.to(self.step.device)
            if row.uniforms is not None:
                uniforms = torch.tensor(row.uniforms, dtype=torch.float64).unsqueeze(1)
            row.sampler = Sampler([prompt], row.most, self.vocab_size, uniforms=uniforms, **self.arguments)

    def move(self, source: int, target: int) -> None:
        if self.seen is not None:
            self.seen[target] = self.seen[source]

    def choose(
        self, logits: torch.Tensor, rows: Sequence[Answer], first: int = 0, ahead: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The next tokens (n,) of rows in the slots from `first` on, by their logits (n, V); the logits (n,) that they were chosen by,
        which are finite if all were; and their log-probabilities (n,), or None.

        ahead: how many tokens were chosen that the rows do not have yet.
        """
        if self.apart:
            return self._apart(logits, rows)
        n, device = len(rows), logits.device
        seen = None if self.seen is None else self.seen[first : first + n]
        self.steps = [len(row.tokens) + ahead for row in rows]
        scores = logits if self.plain and not self.sampled else self.score(logits, seen)
        if self.sampled:
            largest = scores.amax(-1, keepdim=True)
            uniforms = torch.tensor([row.uniforms[step] for row, step in zip(rows, self.steps)], dtype=torch.float64)
            token = draw(scores, uniforms.to(device), largest)
        else:
            token = most_likely(scores) if scores.is_cpu else scores.argmax(-1)
            largest = scores.gather(1, token.unsqueeze(1))
        if seen is not None:
            seen.scatter_(1, token.unsqueeze(1), True)
        logprobs = None
        if self.wants_logprobs:
            logprobs = logits.float().log_softmax(-1).gather(-1, token.unsqueeze(1)).squeeze(1)
        return token, largest.squeeze(1), logprobs

    def forbid_eos(self, logits: torch.Tensor) -> torch.Tensor:
        early = torch.tensor([[step < self.rules["min_new_tokens"]] for step in self.steps], device=logits.device)
        return logits.masked_fill(self.is_eos & early, float("-inf"))

    def _apart(self, logits, rows):
        tokens, largest, logprobs = [], [], []
        for b, row in enumerate(rows):
            tokens.append(row.sampler(logits[b : b + 1]))
            largest.append(row.sampler.extreme[0].clone())
            if self.wants_logprobs:
                logprobs.append(row.sampler.logprobs[len(row.tokens)])
        return torch.cat(tokens), torch.cat(largest), torch.cat(logprobs) if logprobs else None
