"""Top-p sampling: the smallest logit of the nucleus, which is the smallest set of most likely tokens whose total probability is
at least top_p."""

import numpy as np
import torch


def integer_weights(logits: torch.Tensor) -> torch.Tensor:
    """Unnormalized probabilities (B, V) as int64, 2^40 for the most likely token. Their sums do not depend on the order, and do
    not overflow for up to 2^23 tokens."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    return weights.mul_(2.0**40).nan_to_num_(0.0).to(torch.int64)  # NaN: of infinity less itself, too


def top_p_threshold_reference(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest logit (B, 1) of the nucleus of fp32 logits (B, V), by sorting them; the largest one if all weights are 0."""
    values, order = logits.sort(descending=True)
    return threshold_of_sorted(values, integer_weights(logits).gather(-1, order), top_p)


def threshold_of_sorted(values: torch.Tensor, mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest logit (B, 1) of the nucleus, for logits (B, V) in descending order and their weights."""
    before = mass.cumsum(-1) - mass  # total weight of more likely tokens
    kept = before < top_p * mass.sum(-1, keepdim=True).double()
    return values.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)


def top_p_threshold(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """What `top_p_threshold_reference` returns, exactly, without sorting the vocabulary."""
    mass = integer_weights(logits)
    limit = top_p * mass.sum(-1, keepdim=True).double()
    if logits.is_cpu and not torch._C._len_torch_dispatch_stack():
        rows = zip(logits.numpy(), mass.numpy(), limit.flatten().tolist())
        return torch.tensor([[_threshold_by_bisection(*row)] for row in rows])
    return _threshold_by_radix(logits, mass, limit)


# Logits further below the largest have weight 0; the number of times that this range is halved before the rest is sorted.
LOGIT_RANGE, BISECTIONS = 28.0, 8


def _threshold_by_bisection(values: np.ndarray, mass: np.ndarray, limit: float) -> float:
    """For one row: bisects the range of the threshold by the total weight above it, and sorts only the logits in that range."""
    largest = float(values.max())
    if not limit > 0:  # all weights are 0
        return largest
    low, high, rough = largest - LOGIT_RANGE, largest + 1, mass.astype(np.float32)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if np.dot(rough, (values >= middle).astype(np.float32)) >= limit:
            low = middle
        else:
            high = middle
    above = values >= high
    weight_above = int((mass * above).sum())
    near = np.flatnonzero((values >= low) & ~above)
    if not weight_above < limit <= weight_above + int(mass[near].sum()):  # numbers so large that these are as good as equal
        near, weight_above = np.arange(len(values)), 0
    values, mass = values[near], mass[near]
    order = np.argsort(-values)
    before = weight_above + np.cumsum(mass[order]) - mass[order]
    return float(values[order[np.count_nonzero(before < limit) - 1]])


DIGITS = ((21, 11), (10, 11), (0, 10))  # of a 32-bit key: shift and bits, the most significant first


def _threshold_by_radix(logits: torch.Tensor, mass: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """For all rows at once, in a fixed number of launches and without a device sync: a radix select over the logits as integers
    in the same order, where the total weight by digit tells which digit the threshold has."""
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # + 0: there is a -0
    keys = torch.where(bits < 0, ~bits, bits + 2**31)  # from 0 to 2^32 - 1
    key = torch.zeros_like(limit, dtype=torch.int64)
    weight_above: torch.Tensor | int = 0
    for shift, width in DIGITS:
        digits = keys >> shift & (1 << width) - 1
        of_digit = mass.new_zeros(len(mass), 1 << width).scatter_add_(1, digits, mass)
        above = of_digit.sum(-1, keepdim=True) - of_digit.cumsum(-1) + weight_above
        digit = (above >= limit).sum(-1, keepdim=True).clamp(max=(1 << width) - 1)  # above falls as digits grow
        weight_above = above.gather(-1, digit)
        key += digit << shift
        mass = torch.where(digits == digit, mass, 0)
    least = torch.where(key < 2**31, ~key, key - 2**31).to(torch.int32).view(torch.float32)
    return torch.where(limit > 0, least, logits.amax(-1, keepdim=True))
