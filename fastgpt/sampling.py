"""Sampling: from the logits of each row to its next token.

Names, meaning and order of what logits go through are those of transformers. A token is drawn by one uniform number u, as
the first, in the order of the vocabulary, up to which probabilities add up to more than u. The number is a function of the
row's seed, which of its prompt's samples the row is, and the step; so a row's tokens do not depend on the rest of the batch,
on the cache or on the device, as far as rounding of the logits does not move a probability across u.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fastgpt.ops.step import note


def process(logits, *, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """Logits (B, V) -> those that tokens are drawn by, fp32; -inf for tokens that are not to be drawn.

    Each of these follows on the others: repetition_penalty divides the positive logits of tokens in `seen` (B, V), bool,
    and multiplies the negative ones; temperature divides all; top_k, top_p and min_p leave out unlikely ones. A token that
    is as likely as another one that is kept, is kept. At temperature 0 there is the penalty only.
    """
    logits = logits.float()
    if repetition_penalty != 1:
        penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits
    logits = logits / temperature
    likeliest, least = None, None
    if top_k is not None and top_k < logits.shape[-1]:
        likeliest = logits.topk(top_k).values
        least = likeliest[:, -1:]
    if top_p is not None and top_p < 1:
        likeliest = descending(logits) if likeliest is None else likeliest
        probabilities = likeliest.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of all likelier ones: the first is always kept
        least = likeliest.gather(-1, (before < top_p).sum(-1, keepdim=True) - 1)
    if min_p is not None and min_p > 0:
        enough = logits.amax(-1, keepdim=True) + float(np.log(min_p))
        least = enough if least is None else torch.maximum(least, enough)
    return logits if least is None else logits.masked_fill_(logits < least, float("-inf"))


def descending(logits):
    if not logits.is_cpu:
        return logits.sort(descending=True).values
    return torch.from_numpy(np.sort(logits.numpy())).flip(-1)  # a quarter of the time of PyTorch's


def draw(logits, uniform):
    """The token (B,) at uniform (B,) float64, 0 <= uniform < 1, of the distribution that logits (B, V) stand for."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # Less than the last sum, also when rounded; and tokens of weight 0, whose sum is that of the one before, are passed by.
    return torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)


def most_likely(logits):
    """argmax (B,) of logits (B, V)."""
    if not logits.is_cpu:
        return logits.argmax(-1)
    return torch.from_numpy(logits.float().numpy().argmax(-1))  # 4 µs for 50,000 logits, PyTorch's takes 40 to 160


def uniform_numbers(seeds: Sequence[int], num_samples: int, steps: int) -> torch.Tensor:
    """(steps, B * num_samples) float64: of each step, the number of each sample of each prompt.

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
    """Takes the next token of each row, step by step: logits (B, V) -> (B,) int64.

    All it knows is on the device and updated in place, and it never waits for the device: a CUDA graph can have it inside.

    Args:
        prompts: of each row, whose tokens repetition_penalty counts.
        steps: how many there will be at most.
        uniforms: (steps, B) numbers to draw by; None takes the most likely token.
        eos: tokens that end a row.
        logprobs: whether to note log-probabilities.
        rules: what `process` is told.

    tokens: (steps, B) int64, what was taken; -1 for rows that had ended.
    logprobs: (steps, B) fp32, their log-probabilities by the logits as they came, or None; 0 for rows that had ended.
    ended: (B,) bool, or None without eos.
    """

    def __init__(self, prompts, steps: int, vocab_size: int, *, uniforms=None, eos=(), logprobs=False, **rules):
        B, device = len(prompts), prompts[0].device
        self.rules, self.uniforms = rules, None if uniforms is None else uniforms.to(device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.full((steps, B), -1, device=device)
        self.logprobs = torch.zeros(steps, B, device=device) if logprobs else None
        self.ended = torch.zeros(B, dtype=torch.bool, device=device) if eos else None
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device) if eos else None
        self.seen = None
        if rules["repetition_penalty"] != 1:
            self.seen = torch.zeros(B, vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self.seen, prompts):
                row[prompt] = True
        self.plain = uniforms is None and self.seen is None  # the likeliest by the logits as they come

    def __call__(self, logits):
        scores = logits if self.plain else process(logits, seen=self.seen, **self.rules)
        if self.uniforms is None:
            token = most_likely(scores)
        else:
            token = draw(scores, self.uniforms.index_select(0, self.step)[0])
        if self.seen is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)
        if self.logprobs is not None:
            logprobs = logits.float().log_softmax(-1).gather(-1, token.unsqueeze(1)).squeeze(1)
            logprobs = logprobs if self.ended is None else torch.where(self.ended, 0.0, logprobs)
            self.logprobs.index_copy_(0, self.step, logprobs.unsqueeze(0))
        note(token, self.tokens, self.step, self.ended, self.eos)
        return token
