"""Speculation: several tokens of a row from one pass over the weights.

Drafts for a row's next tokens are guessed, and read in one pass with its last token. The sampler then chooses each next token
from the model's logits, as it would without drafts; as long as its choice is the draft, the logits after it are valid, too. What
follows the first other choice is taken back from the cache. So drafts decide how many tokens come of a pass, and never which: a
row's random numbers belong to its steps, and the logits have the bits of single steps (`decoding.Passes`).

Each row goes at its own pace. How many drafts are worth a pass follows from how many were accepted, and from what passes of each
number of tokens were measured to take (`Pace`).

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192); drafts from the text so
far: Yang et al., "Inference with reference" (arXiv 2304.04487).
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from fastgpt.generation.decoding import Passes
from fastgpt.generation.sampling import Sampler, draw, most_likely, process
from fastgpt.model.decoder import GPT
from fastgpt.model.evaluation_mode import evaluating, others


class RowSamplers:
    """A `Sampler` for each row, which has its own number of steps. Arguments are those of `Sampler`.

    tokens: (steps, B) int64 on the CPU; -1 where a row has ended or not come yet.
    logprobs: (steps, B) fp32 or None.
    texts: of each row, its prompt and new tokens.
    counts: of each row, its new tokens.
    done: of each row, whether it has ended.
    tokens_per_pass: of a row, on average, without the first token, which comes of the prompt; None before there was a pass.
    """

    ended = None

    def __init__(
        self, prompts: Sequence[torch.Tensor], steps: int, vocab_size: int,
        *, uniforms: torch.Tensor | None = None, eos: Sequence[int] = (), logprobs: bool = False, **rules,
    ):  # fmt: skip
        self.steps, self.eos, self.row_passes = steps, set(eos), 0
        self.rows = [
            Sampler(
                [prompt], steps, vocab_size, uniforms=None if uniforms is None else uniforms[:, b : b + 1], eos=eos,
                logprobs=logprobs, **rules,
            )
            for b, prompt in enumerate(prompts)
        ]  # fmt: skip
        device = prompts[0].device
        self.tokens = torch.full((steps, len(prompts)), -1, device=device)
        self.logprobs = torch.zeros(steps, len(prompts), dtype=torch.float32, device=device) if logprobs else None
        self.texts = [prompt.tolist() for prompt in prompts]
        self.counts, self.done = [0] * len(prompts), [steps == 0] * len(prompts)
        self.errors: dict[int, ValueError] = {}  # by step

    def choose(self, b: int, logits: torch.Tensor) -> int:
        """The next token of row b by its logits (1, V)."""
        sampler, step = self.rows[b], self.counts[b]
        token = int(sampler(logits))
        self.texts[b].append(token)
        self.tokens[step, b] = token
        if self.logprobs is not None:
            self.logprobs[step, b] = sampler.logprobs[step, 0]
        self.counts[b] = step + 1
        self.done[b] = step + 1 == self.steps or token in self.eos
        try:
            sampler.require_finite(range(step, step + 1), row=b)
        except ValueError as error:  # of this row's step, which the others have yet to reach
            self.errors.setdefault(step, error)
            self.done[b] = True
        return token

    def ready(self) -> int:
        """The number of steps that all rows have done."""
        return min((n for n, done in zip(self.counts, self.done) if not done), default=max(self.counts))

    def require_finite(self, steps: range) -> None:
        """As `Sampler.require_finite`, without a wait."""
        for step in steps:
            if step in self.errors:
                raise self.errors[step]

    @property
    def tokens_per_pass(self) -> float | None:
        return (sum(self.counts) - len(self.counts)) / self.row_passes if self.row_passes else None


class Drafts(Protocol):
    """Where drafts come from."""

    def propose(self, most: list[int], pace: "Pace") -> tuple[int, list[list[int]]]:
        """How many tokens the next pass has, and the drafts of each row, at most `most` of them."""
        ...

    def observe(self, accepted: list[int]) -> None:
        """How many of the drafts that were proposed last were accepted, of each row; after its tokens are in the texts."""
        ...


class Pace:
    """How many tokens a pass should have, to yield most tokens per second.

    Args:
        most: the most tokens of a pass.
        fixed: the number of drafts, if it is not to be adapted.
        timed: whether passes are timed; not where several processes must come to the same number.
    """

    KNOWN = 0.9  # weight of an earlier observation relative to the next one

    def __init__(self, most: int, fixed: int | None = None, timed: bool = True):
        self.most = most if fixed is None else min(most, 1 + fixed)
        self.fixed, self.timed = fixed is not None, timed
        self.sizes = [T for T in (1, 2, 3, 4, 6, 8) if T < self.most] + [self.most]  # each is a recording of its own
        self.seconds: dict[int, float] = {}  # of a pass, by its number of tokens
        self.seen: set[int] = set()
        self.rates: dict[Any, list[float]] = {}  # drafts accepted, and tried

    def rate(self, kind: Any, prior: float) -> float:
        """The probability that a draft of this kind is accepted; before any were, `prior`."""
        accepted, tried = self.rates.get(kind, (0.0, 0.0))
        return (accepted + prior) / (tried + 1)

    def observe(self, kind: Any, accepted: int, tried: int) -> None:
        rate = self.rates.setdefault(kind, [0.0, 0.0])
        weight = self.KNOWN**tried
        rate[0], rate[1] = rate[0] * weight + accepted, rate[1] * weight + tried

    def took(self, T: int, seconds: float) -> None:
        """A pass took so long. The first one of a size is recorded, and does not count."""
        if not self.timed or T not in self.seen:
            self.seen.add(T)
            return
        before = self.seconds.get(T, seconds)
        self.seconds[T] = before + 0.2 * (min(seconds, 2 * before) - before)

    def cost(self, T: int) -> float:
        """Seconds, or in proportion to them, of a pass of T tokens. One not measured yet is taken to cost little more."""
        if T in self.seconds:
            return self.seconds[T]
        known = [seconds / (1 + 0.03 * (size - 1)) for size, seconds in self.seconds.items()]
        return (1 + 0.03 * (T - 1)) * (min(known) if known else 1.0)

    def best(self, expected: list[list[float]]) -> int:
        """The number of tokens of the next pass. expected: of each row, the probabilities that it yields a second token, a
        third, and so on."""
        longest = 1 + max(map(len, expected), default=0)
        if self.fixed:
            return min(longest, self.most)

        def speed(T):
            return sum(1 + sum(row[: T - 1]) for row in expected) / self.cost(T)

        best, plain = 1, speed(1)
        for T in self.sizes[1:]:
            if T <= longest and speed(T) > max(speed(best), 1.03 * plain):
                best = T
        return best


class PromptDrafts:
    """Drafts from the text so far: what followed the latest occurrence of its last tokens.

    Whether that would have been right is known at no cost also where nothing was drafted, so that drafting begins as soon as it
    pays and costs nothing as long as it does not.
    """

    # By the length of the n-grams that are looked up: how often the next token is right, and one after a right one, in answers of
    # SmolLM2-135M. What the text itself shows soon outweighs it.
    PRIORS = {8: (0.9, 0.9), 5: (0.85, 0.85), 3: (0.6, 0.7), 2: (0.5, 0.65), 1: (0.17, 0.5)}

    def __init__(self, samplers: RowSamplers):
        self.samplers = samplers
        self.after: list[dict[tuple, int]] = [{} for _ in samplers.texts]  # an n-gram -> where it last ended
        self.indexed = [0] * len(self.after)

    def propose(self, most: list[int], pace: Pace) -> tuple[int, list[list[int]]]:
        self.pace, self.kinds, self.found = pace, [], []
        expected = []
        for b, count in enumerate(most):
            n, found = self._find(b, min(count, pace.most - 1))
            self.kinds.append(n)
            self.found.append(found)
            first, then = (pace.rate((n, i), prior) for i, prior in enumerate(self.PRIORS.get(n, (0.0, 0.0))))
            expected.append([first * then**i for i in range(len(found))])
        T = pace.best(expected)
        self.drafted = T > 1
        return T, [found[: T - 1] for found in self.found]

    def observe(self, accepted: list[int]) -> None:
        for b, (n, found, count) in enumerate(zip(self.kinds, self.found, accepted)):
            if not found:
                continue
            text = self.samplers.texts[b]
            if not self.drafted:
                self.pace.observe((n, 0), text[-1] == found[0], 1)
                continue
            tried = min(len(found), count + 1)
            self.pace.observe((n, 0), count > 0, 1)
            if tried > 1:
                self.pace.observe((n, 1), count - 1, tried - 1)

    def _find(self, b: int, count: int) -> tuple[int, list[int]]:
        """The length of the longest n-gram that occurred before, and up to `count` tokens that followed it."""
        text, after = self.samplers.texts[b], self.after[b]
        for end in range(self.indexed[b] + 1, len(text)):  # the last tokens have no successor yet
            for n in self.PRIORS:
                if n <= end:
                    after[tuple(text[end - n : end])] = end
        self.indexed[b] = max(len(text) - 1, 0)
        for n in self.PRIORS if count > 0 else ():
            begin = after.get(tuple(text[-n:])) if n < len(text) else None
            if begin is not None:
                period = text[begin:]  # it goes on with itself
                return n, (period * (count // len(period) + 1))[:count]
        return 0, []


class ModelDrafts:
    """Drafts by a smaller model, from the same text. It draws with the row's own random numbers, so that it is right as often as
    both models' distributions allow.

    Args:
        draft: a decoder with the vocabulary of the model.
        uniforms: (steps, B), those of the rows, or None.
        capacity: tokens of the longest row.
    """

    PRIOR = 0.7
    PATIENCE = 32  # passes without a draft until one is tried again

    def __init__(self, draft: GPT, samplers: RowSamplers, uniforms: torch.Tensor | None, rules: dict, capacity: int):
        self.model, self.samplers, self.uniforms, self.foreign = draft, samplers, uniforms, others(draft)
        self.warpers = {name: rules[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        most, rope = min(capacity, draft.config.context_length), draft.config.rope
        if rope is not None and rope.original_context is not None and draft.rope_factors_change(1, most):
            most = rope.original_context  # only as far as keys keep their rotation
        self.cache = draft.new_cache(len(samplers.texts), most)
        self.passes = Passes(draft, self.cache)
        self.device, self.idle = draft.first_weight.device, 0

    def propose(self, most: list[int], pace: Pace) -> tuple[int, list[list[int]]]:
        self.pace = pace
        texts, room = self.samplers.texts, self.cache.capacity
        most = [min(count, room - len(text)) for count, text in zip(most, texts)]
        rate = pace.rate("draft", self.PRIOR)
        T = pace.best([[rate**i for i in range(1, count + 1)] for count in most])
        self.idle = 0 if T > 1 else self.idle + 1
        if self.idle == self.PATIENCE and max(most) > 0:
            T, self.idle = 2, 0
        wanted = [max(min(count, T - 1), 0) for count in most]
        self.lengths = [len(text) for text in texts]
        self.drafts: list[list[int]] = [[] for _ in texts]
        for _ in range(T - 1):
            pending = [
                (text + drafts)[stored:] if len(drafts) < count else []
                for text, drafts, count, stored in zip(texts, self.drafts, wanted, self.cache.counts)
            ]
            for drafts, new, token in zip(self.drafts, pending, self._next(pending)):
                if new:
                    drafts.append(token)
        return 1 + max(map(len, self.drafts)), self.drafts

    def observe(self, accepted: list[int]) -> None:
        for count, drafts in zip(accepted, self.drafts):
            if drafts:
                self.pace.observe("draft", count, min(count + 1, len(drafts)))
        right = [length + count for length, count in zip(self.lengths, accepted)]
        self.cache.truncate([min(pair) for pair in zip(right, self.cache.counts)])

    def _next(self, pending: list[list[int]]) -> list[int]:
        """Reads what is pending of each row, and chooses the token after it."""
        with evaluating(self.foreign):
            while max(map(len, pending)) > self.passes.most:  # after a pause, or the prompt
                now = [new[:-1][:512] for new in pending]
                ids, new = padded(now, self.device)
                if max(new):
                    self.model.hidden(ids.clamp(min=0), self.cache, new, last_only=True)
                pending = [new[len(part) :] for new, part in zip(pending, now)]
            ids, new = padded(pending, self.device)
            logits = self.passes(ids, new)[:, -1]
        with self.passes.around():
            return self._choose(self.model.softcap_logits(logits)).tolist()

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if self.uniforms is None:
            return most_likely(logits) if logits.is_cpu else logits.argmax(-1)
        steps = [count + len(drafts) for count, drafts in zip(self.samplers.counts, self.drafts)]
        last = len(self.uniforms) - 1
        uniform = torch.stack([self.uniforms[min(step, last), b] for b, step in enumerate(steps)])
        return draw(process(logits, **self.warpers), uniform.to(logits.device))


def padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Token ids of several rows (B, T), padded on the left with -1, and how many each has."""
    counts = [len(row) for row in rows]
    T = max(counts)
    return torch.tensor([[-1] * (T - len(row)) + row for row in rows], device=device), counts


def speculative_steps(request: Any) -> Iterator[int]:
    """`Request.steps` with speculation: yields the number of each step when all rows have done it."""
    model, samplers, options = request.model, request.sampler, request.options
    foreign, rows, yielded = others(model), range(len(request.rows)), 0
    with evaluating(foreign):
        logits = request.first_logits()
        for b in rows:
            if not samplers.done[b]:
                samplers.choose(b, logits[b : b + 1])
    if request.recording is None:
        request.recording = Passes(model, request.cache)
    else:
        request.recording.resume(model, request.cache)
    passes = request.recording
    alone = not any(getattr(module, "waits", False) for module in model.modules())  # or else a process of fastgpt.parallel
    pace, drafts = Pace(passes.most, options.speculate_tokens, timed=alone), request.drafts(samplers)
    while True:
        for step in range(yielded, samplers.ready()):
            samplers.require_finite(range(step, step + 1))
            yield step
            yielded = step + 1
        if all(samplers.done):
            return
        begin = time.perf_counter()
        most = [0 if samplers.done[b] else samplers.steps - samplers.counts[b] - 1 for b in rows]
        T, proposed = drafts.propose(most, pace)
        inputs = [[] if samplers.done[b] else samplers.texts[b][-1:] + proposed[b] for b in rows]
        ids, new = padded(inputs, request.rows[0].device)
        with evaluating(foreign):
            logits = passes(ids, new)
        with passes.around():
            accepted = [check(b, inputs[b], logits[b, -len(inputs[b]) :], samplers, model) for b in rows]
        samplers.row_passes += sum(map(bool, new))
        kept = [min(len(text) - 1, stored) for text, stored in zip(samplers.texts, request.cache.counts)]
        if kept != request.cache.counts:
            request.cache.truncate(kept)
        drafts.observe(accepted)
        pace.took(T, time.perf_counter() - begin)


def check(b: int, inputs: list[int], logits: torch.Tensor, samplers: RowSamplers, model: GPT) -> int:
    """Chooses the tokens of row b by the logits (T, V) after its inputs, up to the first that is not the draft. Returns how many
    drafts were accepted."""
    for accepted in range(len(inputs)):
        token = samplers.choose(b, model.softcap_logits(logits[accepted : accepted + 1]))
        if samplers.done[b] or token not in inputs[accepted + 1 : accepted + 2]:
            return accepted + (token in inputs[accepted + 1 : accepted + 2])
    return 0
