"""Many prompts over one pool of pages: rows that have ended leave the batch, and waiting prompts join it at any step.

Rows lie in the first slots of one cache. A pass is over the first 1, 2, 4, 8, 16, ... slots, so few passes are recorded or
captured; slots beyond the rows are padding, which is neither stored nor attended to. A waiting prompt is read in a cache of its own
over the same pool, in pieces between decode steps; then its pages move into a slot. What was read of prompts is kept as long as
there are pages, for prompts that begin alike. If a step finds too few pages, beginnings are dropped, and then the row that joined
last waits again: what it has generated is read with its prompt when it comes back.

Who joins when never changes a token: random numbers belong to a row's seed and steps, and logits differ by rounding at most.

Source: Yu et al., "Orca" (OSDI 2022); Kwon et al., "Efficient memory management for large language model serving with
PagedAttention" (arXiv 2309.06180).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from fastgpt._C import OutOfPages
from fastgpt.cache.paged import PagedCache
from fastgpt.cache.storage import on_device
from fastgpt.generation.batch_size import Width, affordable_pages, bucket
from fastgpt.generation.beginnings import Beginnings
from fastgpt.generation.config import GenerationConfig, integers
from fastgpt.generation.decoding import Passes
from fastgpt.generation.request import EOS_POLL_INTERVAL, PREFILL_CHUNK, read
from fastgpt.generation.slot_sampling import Answer, SlotSampler
from fastgpt.model.decoder import GPT
from fastgpt.model.evaluation_mode import evaluating, others
from fastgpt.ops.linear import MAX_ROWS_CPU

MOST_ROWS = {"cpu": MAX_ROWS_CPU, "cuda": 256}  # by default; a CPU records steps of so many, each with the bits of one row


class Scheduler:
    """Generates rows, some at a time.

    Args:
        model: the decoder.
        rows: whose tokens and logprobs are filled.
        options: their `GenerationConfig`.
        ends: called with each new token of a row, as ends(row, token): whether it ends the row.
        num_pages: of the pool; default: as many as the rows can need at once, within `affordable_pages`.

    Raises: ValueError if a row does not fit into the pages.
    """

    def __init__(
        self, model: GPT, rows: Sequence[Answer], options: GenerationConfig,
        ends: Callable[[Answer, int], bool] = lambda row, token: False, num_pages: int | None = None,
    ):  # fmt: skip
        self.model, self.options, self.ends, self.foreign = model, options, ends, others(model)
        self.device, self.eos = model.first_weight.device, integers("eos", options.eos or ())
        # Those with most to do first, so that few rows are left at the end.
        self.waiting = deque(sorted((row for row in rows if row.most > 0), key=lambda row: -row.most))
        self.chunk = options.prefill_chunk or PREFILL_CHUNK[self.device.type]
        most = min(len(self.waiting) or 1, options.max_batch or MOST_ROWS[self.device.type])
        alone = not any(getattr(module, "waits", False) for module in model.modules())  # no process of fastgpt.parallel
        self.width = Width(most, fixed=options.max_batch is not None or not alone)
        lengths = sorted((len(row.prompt) + row.most - 1 for row in self.waiting), reverse=True) or [1]
        page = min(options.page_size, lengths[0])
        if num_pages is None:
            num_pages = sum(-(-length // page) for length in lengths[:most])
            num_pages = min(num_pages, max(affordable_pages(model, page, options.cache_dtype), -(-lengths[0] // page)))
        if num_pages * page < lengths[0]:
            raise ValueError(f"num_pages: expected room for a row of {lengths[0]} tokens, got {num_pages} pages of {page}")
        self.slots = cast(PagedCache, model.new_cache(
            most, lengths[0], kind="paged", cache_dtype=options.cache_dtype, window=options.window, page_size=page,
            num_pages=num_pages,
        ))  # fmt: skip
        self.pool, self.page = self.slots.pool, page
        self.sampler = SlotSampler(
            most, model.config.vocab_size, model.first_weight, eos=self.eos, logprobs=options.return_logprobs, **options.rules
        )  # fmt: skip
        self.rows: list[Answer] = []  # row i in slot i
        self.joined: dict[Answer, int] = {}  # when
        self.reading: Any = None  # (rows, their cache, the pieces to come)
        self.beginnings = Beginnings(self.pool.allocator, page)
        self.passes: dict[int, Passes] = {}  # by number of slots
        self.steps, self.preemptions = 0, 0

    @torch.inference_mode()
    def run(self) -> Iterator[Answer]:
        """Yields each row when it has ended. A row that is interrupted keeps the tokens that it has."""
        while self.waiting or self.rows or self.reading:
            with evaluating(self.foreign):
                ended = self.read()
                ended += self.step() if self.rows else []
            yield from ended

    def read(self) -> list[Answer]:
        """Reads the next pieces of prompts. Returns rows that have ended at their first token."""
        left, ended = self.chunk, []
        while left > 0 and (self.reading or self.admit()):
            (rows, cache, pieces), before = self.reading, sum(self.reading[1].counts)
            try:
                hidden = next(pieces)
            except OutOfPages:  # steps have taken those that there were
                if not self.beginnings.drop(self.in_use()):
                    self.stop_reading()
                    break
                self.reading = rows, cache, self.pieces(rows, cache)
                continue
            left -= sum(cache.counts) - before
            if all(count == len(row.prompt) + len(row.tokens) for row, count in zip(rows, cache.counts)):
                self.reading = None
                ended += self.join(rows, cache, self.model.logits(hidden[:, -1]))
        return ended

    def pieces(self, rows: list[Answer], cache: PagedCache) -> Iterator[torch.Tensor]:
        left = [row.ids()[count:].to(self.device) for row, count in zip(rows, cache.counts)]
        return read(self.model, cache, left, self.chunk)

    def admit(self) -> bool:
        """Begins to read the next prompt, and with it others of about its length, if there are slots and pages."""
        rows, sequences, longest, pages = list[Answer](), list[int](), 0, len(self.rows)  # a page for each row's next tokens
        allocator, room = self.pool.allocator, min(self.width.now, self.slots.batch_size) - len(self.rows)
        while self.waiting and len(rows) < room:
            ids = self.waiting[0].ids()
            stored, beginning = self.beginnings.find(ids)
            new = len(ids) - stored
            longest = longest or new
            if rows and (
                new * (len(rows) + 1) > self.chunk
                or not 0.75 * longest <= new <= longest
                or any(self.beginnings.common(ids, row.ids()) > stored for row in rows)  # it waits until that has been read
            ):
                break
            sequence = allocator.allocate() if beginning is None else allocator.fork(beginning)
            allocator.truncate(sequence, stored)
            pages += -(-len(ids) // self.page) - stored // self.page
            if not self.beginnings.leave_free(pages, self.in_use()) and (self.rows or rows):
                allocator.free(sequence)
                break
            row = self.waiting.popleft()
            row.beginning = beginning
            rows.append(row)
            sequences.append(sequence)
        if rows:
            cache = self.slots.like(len(rows))
            for b, sequence in enumerate(sequences):
                allocator.free(cache.sequences[b])
                cache.put(b, sequence)
            self.reading = rows, cache, self.pieces(rows, cache)
        return bool(rows)

    def in_use(self) -> set[int | None]:
        """Beginnings whose pages rows have, too: dropping them would free none."""
        return {row.beginning for row in self.rows + (self.reading[0] if self.reading else [])}

    def stop_reading(self) -> None:
        """The prompts that are being read wait again."""
        rows, cache, _ = self.reading
        cache.free()
        self.waiting.extendleft(reversed(rows))
        self.reading, self.preemptions = None, self.preemptions + 1

    def join(self, rows: list[Answer], cache: PagedCache, logits: torch.Tensor) -> list[Answer]:
        """Rows that have been read take slots, and their next tokens by logits (n, V)."""
        for slot, (row, sequence) in enumerate(zip(rows, cache.sequences), first := len(self.rows)):
            row.beginning = self.beginnings.keep(row.ids(), sequence)
            self.sampler.join(slot, row)
            self.pool.allocator.free(self.slots.sequences[slot])  # an empty one
            self.slots.put(slot, sequence)
            self.joined[row] = self.steps
            self.rows.append(row)
        return self.take([self.sampler.choose(logits, rows, first)], rows)

    def step(self) -> list[Answer]:
        """A decode step of all rows, or on a GPU some, at whose end tokens are looked at. Returns rows that have ended."""
        begin, n, chosen = time.perf_counter(), len(self.rows), list[tuple]()
        joins = self.reading or (self.waiting and len(self.rows) < self.width.now)
        most = 1 if joins or self.sampler.apart else EOS_POLL_INTERVAL[self.device.type]
        most = min(most, *(row.most - len(row.tokens) for row in self.rows))
        token = on_device([row.tokens[-1] for row in self.rows], self.device)
        for ahead in range(most):
            try:
                logits = self.next_logits(token)
            except OutOfPages:
                if chosen:
                    break
                self.make_room()
                return []
            chosen.append(self.sampler.choose(logits, self.rows, ahead=ahead))
            token = chosen[-1][0]
        ended = self.take(chosen, self.rows[:])
        self.steps += len(chosen)
        self.width.took(n, (time.perf_counter() - begin) / len(chosen))
        return ended

    def next_logits(self, token: torch.Tensor) -> torch.Tensor:
        """The logits (n, V) after the last token (n,) of each row. Raises OutOfPages before anything changes."""
        n, size = len(token), bucket(len(token), self.slots.batch_size)
        if size not in self.passes:
            self.passes[size] = Passes(self.model, self.slots.first(size))
        passes, cache = self.passes[size], cast(PagedCache, self.passes[size].cache)
        cache.sequences, cache.counts = self.slots.sequences[:size], self.slots.counts[:size]
        ids = torch.nn.functional.pad(token, (0, size - n), value=-1).unsqueeze(1)
        logits = passes(ids, [1] * n + [0] * (size - n))
        self.slots.counts[:n] = cache.counts[:n]
        with passes.around():
            return self.model.softcap_logits(logits[:n, -1])

    def take(self, chosen: list, rows: list[Answer]) -> list[Answer]:
        """Adds the tokens of some steps to rows. Those that have ended leave; returns them."""
        tokens, largest, logprobs = ([] if x[0] is None else torch.stack(x).t().tolist() for x in zip(*chosen))
        ended = []
        for b, row in enumerate(rows):
            for i, token in enumerate(tokens[b]):
                if not math.isfinite(largest[b][i]):
                    raise self.sampler.not_finite(largest[b][i], range(len(row.tokens), len(row.tokens) + 1), row.index)
                row.tokens.append(token)
                row.logprobs += [logprobs[b][i]] if logprobs else []
                row.done = self.ends(row, token) or token in self.eos or len(row.tokens) == row.most
                if row.done:
                    ended.append(row)
                    break
        for row in ended:
            self.leave(row)
        return ended

    def leave(self, row: Answer) -> None:
        """Frees a row's slot, into which the last row moves."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        self.pool.allocator.free(self.slots.sequences[slot])
        if slot != last:
            self.rows[slot] = self.rows[last]
            self.slots.put(slot, self.slots.sequences[last])
            self.sampler.move(last, slot)
        self.slots.put(last, self.pool.allocator.allocate())
        self.rows.pop()
        del self.joined[row]

    def make_room(self) -> None:
        """Gives pages back, of what is needed last. There are enough for a row that is alone."""
        if self.beginnings.drop(self.in_use()):
            return
        if self.reading:
            self.stop_reading()
        elif len(self.rows) > 1:
            row = max(self.rows, key=lambda row: self.joined[row])
            self.leave(row)
            self.waiting.appendleft(row)
            self.preemptions += 1
        elif not self.beginnings.drop():
            raise RuntimeError("a row that is alone has too few pages")  # which the number of pages rules out
