"""A call of `generate` with many prompts: its rows, checked, and their results."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.request import new_tokens, require_fitting, seeds_of
from fastgpt.generation.sampling import uniform_numbers
from fastgpt.generation.scheduler import Scheduler
from fastgpt.generation.slot_sampling import Answer
from fastgpt.model.inputs import as_prompts, is_several, require_room

MOST_TOGETHER = 64  # rows that begin together where the caller does not say


class Interrupted(KeyboardInterrupt):
    """Ctrl-C among many prompts.

    results: a list of what the call would have returned for each row, prompts in order, and None for rows that had not ended.
    """

    def __init__(self, results: list) -> None:
        super().__init__(f"{sum(result is not None for result in results)} of {len(results)} are done")
        self.results = results

    def __reduce__(self) -> tuple:
        return Interrupted, (self.results,)  # and not what the message says


class Many:
    """The rows of a call, which join and leave a batch.

    Args:
        ends: as of `Scheduler`.
        num_pages: as of `Scheduler`.

    rows: the samples of the first prompt, then of the next one.
    Raises: TypeError, ValueError, naming the argument.
    """

    def __init__(
        self, model: Any, ids: Any, max_new_tokens: int | Sequence[int] | None, options: GenerationConfig,
        ends: Callable[[Answer, int], bool] = lambda row, token: False, num_pages: int | None = None,
    ):  # fmt: skip
        if model.config.cross_attention:
            raise ValueError(f"model: expected {WITHOUT_STATES} {WHERE}")
        prompts = [prompt.cpu() for prompt in as_prompts(model, ids)]
        require_fitting(model, options, len(prompts))
        for prompt in prompts:
            require_room("ids", len(prompt), model.config)
        numbers: Any = max_new_tokens if is_several(max_new_tokens) else [max_new_tokens] * len(prompts)
        if len(numbers) != len(prompts):
            raise ValueError(f"max_new_tokens: expected one integer or {len(prompts)}, one for each prompt, got {len(numbers)}")
        if is_several(max_new_tokens) and isinstance(ids, (torch.Tensor, np.ndarray)):
            raise ValueError("max_new_tokens: expected an integer for ids (B, T), got a list: pass a list of prompts with it")
        longest = 0 if options.max_batch is not None else max(map(len, prompts))  # of rows that would otherwise begin together
        most = [
            new_tokens("max_new_tokens", number, max(len(prompt), longest if number is None else 0), model)
            for number, prompt in zip(numbers, prompts)
        ]
        if (reason := refused(model, options)) is not None:
            raise ValueError(f"{reason[0]}: expected {reason[1]} {WHERE}")
        if model.rope_factors_change(min(map(len, prompts)), max(len(prompt) + n for prompt, n in zip(prompts, most))):
            raise ValueError(
                f"ids: expected prompts and answers on one side of the length at which longrope rotates all keys anew {WHERE}"
            )
        n, self.rows = options.num_samples, []
        seeds = seeds_of(options, len(prompts)) if options.temperature else []
        for b, (prompt, number) in enumerate(zip(prompts, most)):
            uniforms = uniform_numbers([seeds[b]], n, number).t().tolist() if seeds else [None] * n
            self.rows += [Answer(b * n + i, prompt, number, uniforms[i]) for i in range(n)]
        self.options = options
        self.scheduler = Scheduler(model, self.rows, options, ends, num_pages)

    def run(self, progress: bool = False) -> Iterator[Answer]:
        """Yields each row when it has ended. progress: whether to show a progress bar on standard error."""
        with tqdm(total=len(self.rows), unit="row", disable=not progress or None) as bar:
            for row in self.rows:
                if row.most == 0:
                    row.done = True
                    bar.update()
                    yield row
            for row in self.scheduler.run():
                bar.update()
                yield row

    def result(self, row: Answer) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a row, prompt included, on the device of the model; with return_logprobs also those of the new ones."""
        device = self.scheduler.device
        tokens = row.ids().to(device)
        return (tokens, torch.tensor(row.logprobs, device=device)) if self.options.return_logprobs else tokens

    def finish(self, progress: bool = False) -> list:
        """The results of all rows, in order. Raises Interrupted on Ctrl-C."""
        try:
            for _ in self.run(progress):
                pass
        except KeyboardInterrupt:
            raise Interrupted([self.result(row) if row.done else None for row in self.rows]) from None
        return [self.result(row) for row in self.rows]


WITHOUT_STATES = "one without cross-attention, whose encoder states have no pages,"
WHERE = "where rows join and leave: with max_batch, a list of max_new_tokens, or generate_each"


def is_many(model: Any, ids: Any, max_new_tokens: Any, options: GenerationConfig) -> bool:
    """Whether a call of `generate` has rows join and leave, rather than begin together."""
    if options.max_batch is not None or is_several(max_new_tokens):
        return True
    ragged = is_several(ids) and not isinstance(ids, np.ndarray)
    return (
        ragged
        and len(ids) * options.num_samples > MOST_TOGETHER
        and not options.logits_processors
        and refused(model, options) is None
        and not model.rope_factors_change(1, model.config.context_length)
    )


def refused(model: Any, options: GenerationConfig) -> tuple[str, str] | None:
    """An argument that keeps the rows of a call from joining and leaving, and what is expected of it; or None."""
    if model.config.cross_attention:
        return "model", WITHOUT_STATES
    if not options.use_cache:
        return "use_cache", "True"
    if options.cache == "sliding":
        return "cache", "contiguous or paged"  # its memory cannot be shared
    if options.speculate is not None:
        return "speculate", "None"  # rows that go together fill a pass already
    return None
