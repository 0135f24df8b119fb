"""Sampling: from the logits of each row to its next token.

Names, meaning and order of the logits processors are those of transformers. A token is sampled by inverting the cumulative
distribution at one uniform number u: it is the first, in the order of the vocabulary, whose cumulative probability exceeds u.
The number is a function of the row's seed, the index of the sample of its prompt, and the step; so a row's tokens do not depend
on the rest of the batch, on the cache or on the device, unless rounding of the logits moves a cumulative probability across u.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastgpt.checks import PENALTY, require_device, require_integer, require_number, require_shape, require_tensor, shown
from fastgpt.generation.history import History, NgramBlocker
from fastgpt.generation.top_p import integer_weights, threshold_of_sorted, top_p_threshold
from fastgpt.ops.decode_step import record_token

LARGEST = torch.finfo(torch.float32).max
LOW_TEMPERATURE = 1e-3  # below it, logits divided by it may overflow fp32, unless the largest is subtracted first

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def checked_rules(
    *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float = 1.0, no_repeat_ngram_size: int | None = 0, min_new_tokens: int | None = 0,
    logit_bias: Mapping[int, float] | None = None, logits_processors: Processor | Sequence[Processor] | None = (),
) -> dict[str, Any]:  # fmt: skip
    """The rules by which a token is chosen, checked and normalized: see `GenerationConfig`.

    Raises: TypeError, ValueError, naming the rule.
    """
    return {
        "temperature": float(require_number("temperature", temperature, least=0)),
        "top_k": require_integer("top_k", top_k, least=1, optional=True),
        "top_p": require_number("top_p", top_p, above=0, most=1, optional=True),
        "min_p": require_number("min_p", min_p, least=0, most=1, optional=True),
        "repetition_penalty": float(require_number("repetition_penalty", repetition_penalty, **PENALTY)),
        "no_repeat_ngram_size": require_integer("no_repeat_ngram_size", no_repeat_ngram_size, least=0, optional=True) or 0,
        "min_new_tokens": require_integer("min_new_tokens", min_new_tokens, least=0, optional=True) or 0,
        "logit_bias": checked_bias(logit_bias),
        "logits_processors": checked_processors(logits_processors),
    }


def checked_bias(bias: Mapping[int, float] | None) -> dict[int, float]:
    """A logit_bias: finite in fp32, or -inf."""
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias: expected a dict of token ids and numbers to add to their logits, got {shown(bias)}")
    result = {}
    for token, value in bias.items():
        token = require_integer("logit_bias", token, least=0)
        forbidden = isinstance(value, (float, np.floating)) and value == float("-inf")
        result[token] = float(value if forbidden else require_number("logit_bias", value, least=-LARGEST, most=LARGEST))
    return result


def checked_processors(processors: Processor | Sequence[Processor] | None) -> tuple[Processor, ...]:
    """logits_processors, one or several; a list of them that is callable too, as transformers', is several."""
    several = tuple(processors) if isinstance(processors, Sequence) else () if processors is None else (processors,)
    if not all(map(callable, several)):
        raise TypeError(f"logits_processors: expected a callable or a list of them, got {shown(processors)}")
    return several


def process(
    logits: torch.Tensor,
    *, seen: torch.Tensor | None = None, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, repetition_penalty: float = 1.0,
    processors: Iterable[Callable[[torch.Tensor], torch.Tensor]] = (),
) -> torch.Tensor:  # fmt: skip
    """Logits (B, V) -> the fp32 logits that tokens are sampled from; -inf for tokens that are excluded.

    In this order: repetition_penalty divides the positive logits of tokens in `seen` (B, V), bool, and multiplies the negative
    ones; `processors`, functions of logits, are applied; temperature divides all logits; top_k, top_p and min_p exclude
    unlikely tokens. Ties are kept: a token as likely as one that is kept is kept, too. At temperature 0, nothing is done after
    `processors`. To avoid overflow, the largest logit is subtracted at temperatures near 0, and logits are float64 at extreme
    penalties.
    """
    logits = logits.float()
    if repetition_penalty != 1:
        logits = logits if fits_fp32(repetition_penalty) else logits.double()
        penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    for function in processors:
        logits = function(logits)
    if temperature == 0:
        return logits
    if temperature < LOW_TEMPERATURE:
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / min(max(temperature, 2.0**-126), 2.0**127)  # fp32's normal numbers
    if top_p is not None and logits.dtype == torch.float64:
        logits = (logits - logits.amax(-1, keepdim=True)).float()
    likeliest, least = None, None
    if top_k is not None and top_k < logits.shape[-1]:
        likeliest = logits.topk(top_k).values
        least = likeliest[:, -1:]
    if top_p is not None and top_p < 1:
        least = (
            top_p_threshold(logits, top_p)
            if likeliest is None
            else threshold_of_sorted(likeliest, integer_weights(likeliest), top_p)
        )
    if min_p is not None and min_p > 0:
        enough = logits.amax(-1, keepdim=True) + math.log(min_p)
        least = enough if least is None else torch.maximum(least, enough)
    return logits if least is None else logits.masked_fill_(logits < least, float("-inf"))


def fits_fp32(repetition_penalty: float) -> bool:
    """Whether penalized logits stay within fp32's range."""
    return 1e-4 <= repetition_penalty <= 1e4


def draw(logits: torch.Tensor, uniform: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Samples a token (B,) from the softmax of logits (B, V), by uniform (B,) float64, 0 <= uniform < 1.

    largest: (B, 1), the largest logit, if it is known. Where it is not finite, the token is any of the vocabulary.
    """
    largest = logits.amax(-1, keepdim=True) if largest is None else largest
    weights = (logits - largest).exp_()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # Less than the last sum, also when rounded; and tokens of weight 0, whose sum is that of the one before, are skipped.
    token = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    return token.clamp_(max=logits.shape[-1] - 1)  # if sums are NaN


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """argmax (B,) of logits (B, V) on a CPU; the index of a NaN if there is one."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.from_numpy(logits.numpy().argmax(-1))  # 4 µs for 50,000 logits, PyTorch's takes 40 to 160


def uniform_numbers(seeds: Sequence[int], num_samples: int, steps: int) -> torch.Tensor:
    """(steps, B * num_samples) float64: for each step, the number of each sample of each prompt.

    Sample i of a prompt has a generator of its own, Philox with the key (seed, i): the first steps are the same however many
    follow, and the first samples however many there are.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64))).random(steps)
        for seed in seeds
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.stack(rows, axis=1))


class Sampler:
    """Chooses the next token of each row, step by step: logits (B, V) -> (B,) int64, always in the vocabulary.

    Its state is on the device and updated in place. Without logits_processors it never synchronizes with the device and runs no
    code of the caller, so a CUDA graph can capture it.

    Args:
        prompts: of each row, (T,) int64.
        steps: the maximum number of steps.
        uniforms: (steps, B) numbers to sample by; None is greedy decoding.
        eos: tokens that end a row.
        logprobs: whether to record log-probabilities.
        rules: those of `checked_rules`.

    tokens: (steps, B) int64, the chosen tokens; -1 for rows that had ended.
    extreme: (B, 1), the largest magnitude so far of the largest logit of each step; see `require_finite`.
    logprobs: (steps, B) fp32, their log-probabilities by the unprocessed logits, or None; 0 for rows that had ended.
    ended: (B,) bool, or None without eos.
    """

    def __init__(
        self, prompts: Sequence[torch.Tensor], steps: int, vocab_size: int,
        *, uniforms: torch.Tensor | None = None, eos: Sequence[int] = (), logprobs: bool = False, **rules,
    ):  # fmt: skip
        B, device = len(prompts), prompts[0].device
        self.rules = rules = checked_rules(**rules)
        self.uniforms = None if uniforms is None else uniforms.to(device, copy=True)
        self.step = torch.empty(1, dtype=torch.int64, device=device)
        self.tokens = torch.empty(steps, B, dtype=torch.int64, device=device)
        self.logprobs = torch.empty(steps, B, dtype=torch.float32, device=device) if logprobs else None
        dtype = torch.float32 if fits_fp32(rules["repetition_penalty"]) else torch.float64
        self.extreme = torch.empty(B, 1, dtype=dtype, device=device)
        self.ended = torch.empty(B, dtype=torch.bool, device=device) if eos else None
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device) if eos else None
        self.bias = self.seen = self.history = self.repeats = None
        self.processors = []
        if rules["logit_bias"]:
            self.bias = torch.zeros(vocab_size)
            self.bias[list(rules["logit_bias"])] = torch.tensor(list(rules["logit_bias"].values()))
            self.bias = self.bias.to(device)
        if rules["repetition_penalty"] != 1:
            self.seen = torch.empty(B, vocab_size, dtype=torch.bool, device=device)
        if rules["no_repeat_ngram_size"] or rules["logits_processors"]:
            self.history = History(prompts, steps)
        if rules["no_repeat_ngram_size"]:
            self.repeats = NgramBlocker(self.history, rules["no_repeat_ngram_size"])
            self.processors.append(self.repeats.forbid)
        if rules["min_new_tokens"] and eos:
            self.is_eos = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, self.eos, True)
            self.processors.append(self.forbid_eos)
        if rules["logits_processors"]:
            self.processors.append(self.call_processors)
        self.warpers = {name: rules[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        # greedy decoding by the unprocessed logits
        self.plain = uniforms is None and self.bias is None and self.seen is None and not self.processors
        self.reset(prompts)

    def reset(self, prompts: Sequence[torch.Tensor], uniforms: torch.Tensor | None = None) -> None:
        """Starts again at the first step, for the same number of prompts and, if given, with other uniform numbers; in place,
        so that a captured step sees it. With a history, the longest prompt must be as long as before."""
        if uniforms is not None:
            self.uniforms.copy_(uniforms)
        self.step.zero_()
        self.tokens.fill_(-1)
        self.extreme.zero_()
        for zeros in (self.logprobs, self.ended, self.seen):
            if zeros is not None:
                zeros.zero_()
        if self.seen is not None:
            for row, prompt in zip(self.seen, prompts):
                row[prompt] = True
        if self.history is not None:
            self.history.reset(prompts)
        if self.repeats is not None:
            self.repeats.reset()
        self.calls = 0  # of logits_processors

    def results(self) -> "Sampler":
        """A copy of the results so far, which `reset` of this sampler does not change."""
        result = copy.copy(self)
        for name in ("tokens", "logprobs", "extreme"):
            value = getattr(self, name)
            setattr(result, name, None if value is None else value.clone())
        return result

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = logits if self.plain else self.score(logits)
        if self.uniforms is not None:
            largest = scores.amax(-1, keepdim=True)
            token = draw(scores, self.uniforms.index_select(0, self.step)[0], largest)
        elif scores.is_cpu:
            token = most_likely(scores)
            largest = scores  # `record_token` finds the token's
        else:
            largest, token = scores.max(-1, keepdim=True)  # in one launch
            token = token.squeeze(1)
        if self.seen is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)
        if self.history is not None:
            self.history.append(token if self.ended is None else torch.where(self.ended, self.eos[0], token), self.step)
        if self.repeats is not None:
            self.repeats.append(token)
        if self.logprobs is not None:
            logprobs = logits.float().log_softmax(-1).gather(-1, token.unsqueeze(1)).squeeze(1)
            logprobs = logprobs if self.ended is None else torch.where(self.ended, 0.0, logprobs)
            self.logprobs.index_copy_(0, self.step, logprobs.unsqueeze(0))
        record_token(token, largest, self.tokens, self.extreme, self.step, self.ended, self.eos)
        return token

    def score(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """The logits that tokens are chosen by: after all rules. seen: (B, V) bool, if it is not that of all rows."""
        logits = logits if self.bias is None else logits.float() + self.bias
        return process(logits, seen=self.seen if seen is None else seen, processors=self.processors, **self.warpers)

    def forbid_eos(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(self.is_eos & (self.step < self.rules["min_new_tokens"]), float("-inf"))

    def call_processors(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(torch.float32, copy=True)  # a processor may write into it
        for rows, tokens in self.history.by_prompt_length(self.calls):
            logits[rows] = self.processed(tokens, logits[rows])
        self.calls += 1
        return logits

    def processed(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits of rows with equally many tokens, after all logits_processors."""
        processors = self.rules["logits_processors"]
        for i, processor in enumerate(processors):
            name = "logits_processors" if len(processors) == 1 else f"logits_processors[{i}]"
            result = processor(tokens, logits)
            require_tensor(name, result)
            require_shape(name, result, tuple(logits.shape), "(B, V) from each, as it was given")
            require_device(name, result, logits.device)
            if not result.is_floating_point():
                raise TypeError(f"{name}: expected floating-point logits from each, got {result.dtype}")
            logits = result.float()
        return logits

    def require_finite(self, steps: range, row: int = 0) -> None:
        """Synchronizes with the device. Raises ValueError if at any of these steps, those since the last call, a row that had
        not ended had logits that no token can be chosen by: NaN or inf among them, or -inf for every token. row: the number of the
        first row, in the message."""
        values = self.extreme.view(-1).tolist()
        if not all(map(math.isfinite, values)):
            row, value = next((row, value) for row, value in enumerate(values, row) if not math.isfinite(value))
            raise self.not_finite(value, steps, row)

    def not_finite(self, value: float, steps: range, row: int) -> ValueError:
        """The error for a largest logit of this value, in a row at one of these steps."""
        got = "nan" if math.isnan(value) else "inf, or -inf for every token,"
        when = f"step {steps[0]}" if len(steps) == 1 else f"one of steps {steps[0]} to {steps[-1]}"
        rules = ("logit_bias", "no_repeat_ngram_size", "min_new_tokens", "logits_processors")
        after = ["repetition_penalty"] * (self.seen is not None) + [name for name in rules if self.rules[name]]
        return ValueError(
            f"logits: expected finite ones to choose a token by, got {got} in row {row} at {when}"
            + (f", after {', '.join(after)}" if after else "")
        )
