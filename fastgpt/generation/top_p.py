"""Top-p sampling: the least logit of the nucleus, the fewest of the most likely tokens whose masses, together, are at least
top_p of all."""

import numpy as np
import torch


def masses(logits: torch.Tensor) -> torch.Tensor:
    """What tokens (B, V) weigh against each other: int64, 2^40 for the likeliest. Sums are the same in whatever order; of up
    to 2^23 tokens they do not overflow."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    return weights.mul_(2.0**40).nan_to_num_(0.0).to(torch.int64)  # NaN: of infinity less itself, too


def top_p_threshold_reference(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least (B, 1) of the logits (B, V) fp32 of the nucleus, from all of them in order; the largest, if nothing weighs."""
    values, order = logits.sort(descending=True)
    return threshold_of_sorted(values, masses(logits).gather(-1, order), top_p)


def threshold_of_sorted(values: torch.Tensor, mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least (B, 1) of the nucleus, of values (B, V) in descending order and what they weigh."""
    before = mass.cumsum(-1) - mass  # of all likelier ones
    kept = before < top_p * mass.sum(-1, keepdim=True).double()
    return values.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)


def top_p_threshold(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What `top_p_threshold_reference` returns, exactly, without sorting the vocabulary."""
    mass = masses(logits)
    limit = top_p * mass.sum(-1, keepdim=True).double()
    if logits.is_cpu and not torch._C._len_torch_dispatch_stack():
        rows = zip(logits.numpy(), mass.numpy(), limit.flatten().tolist())
        return torch.tensor([[_threshold_by_bisection(*row)] for row in rows])
    return _threshold_by_digits(logits, mass, limit)


# Logits so far below the largest weigh nothing; how often the range from there is halved, to where the least is looked for.
REACH, HALVINGS = 28.0, 8


def _threshold_by_bisection(values: np.ndarray, mass: np.ndarray, limit: float) -> float:
    """Of one row: only logits near the least are put in order, between two that are found by what those above weigh."""
    largest = float(values.max())
    if not limit > 0:  # nothing weighs
        return largest
    low, high, rough = largest - REACH, largest + 1, mass.astype(np.float32)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if np.dot(rough, (values >= middle).astype(np.float32)) >= limit:
            low = middle
        else:
            high = middle
    above = values >= high
    likelier = int((mass * above).sum())
    near = np.flatnonzero((values >= low) & ~above)
    if not likelier < limit <= likelier + int(mass[near].sum()):  # numbers so large that these are as good as equal
        near, likelier = np.arange(len(values)), 0
    values, mass = values[near], mass[near]
    order = np.argsort(-values)
    before = likelier + np.cumsum(mass[order]) - mass[order]
    return float(values[order[np.count_nonzero(before < limit) - 1]])


DIGITS = ((21, 11), (10, 11), (0, 10))  # of a 32-bit key: shift and bits, the first first


def _threshold_by_digits(logits: torch.Tensor, mass: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Of all rows at once, in as many launches whatever the numbers are, and without waiting for them: digit by digit of the
    logits as integers in the same order, the masses by digit say which one the least of the nucleus has."""
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # + 0: there is a -0
    keys = torch.where(bits < 0, ~bits, bits + 2**31)  # from 0 to 2^32 - 1
    key = torch.zeros_like(limit, dtype=torch.int64)
    likelier: torch.Tensor | int = 0
    for shift, width in DIGITS:
        digits = keys >> shift & (1 << width) - 1
        of_digit = mass.new_zeros(len(mass), 1 << width).scatter_add_(1, digits, mass)
        above = of_digit.sum(-1, keepdim=True) - of_digit.cumsum(-1) + likelier
        digit = (above >= limit).sum(-1, keepdim=True).clamp(max=(1 << width) - 1)  # above falls as digits grow
        likelier = above.gather(-1, digit)
        key += digit << shift
        mass = torch.where(digits == digit, mass, 0)
    least = torch.where(key < 2**31, ~key, key - 2**31).to(torch.int32).view(torch.float32)
    return torch.where(limit > 0, least, logits.amax(-1, keepdim=True))
