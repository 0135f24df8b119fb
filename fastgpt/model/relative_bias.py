"""T5's relative position bias: a number for each head and each bucket of distances, which is added to the scores of attention.

    bias[h, i, j] = weight[bucket(j - i), h],   i, j: positions of query and key

One table serves all layers of a stack: it is looked up once for each pass, and the cache adds it in each layer.

Source: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv 1910.10683), section 2.1.
"""

import functools
import math

import torch
import torch.nn as nn

from fastgpt.checks import is_autocasting
from fastgpt.model.config import GPTConfig
from fastgpt.model.fusion import plain
from fastgpt.model.rope import MAX_POSITIONS, Tables


def buckets(rows: int, *, number: int, max_distance: int, causal: bool) -> tuple[torch.Tensor]:
    """The bucket of each offset, position of the key minus that of the query, from -rows / 2 up to rows / 2, not included: (rows,)
    int64, in a tuple. rows: an even number.

    The first half of the buckets has a distance each; in the others, ranges of distances grow by a constant factor up to
    max_distance, and the last one has all beyond. Keys after the query have as many of their own, unless causal, where they have
    none: bucket 0.
    """
    offsets = torch.arange(-rows // 2, rows // 2, device="cpu")
    distances = -offsets.clamp(max=0) if causal else offsets.abs()
    number = number if causal else number // 2
    exact = number // 2
    # In fp32, and in this order: where a range ends on a whole number, rounding decides.
    far = exact + ((distances.float() / exact).log() / math.log(max_distance / exact) * (number - exact)).long()
    found = torch.where(distances < exact, distances, far.clamp(max=number - 1))
    return (found if causal else found + number * (offsets > 0),)


@plain(weights=1)
class RelativeBias(nn.Module):
    """The bias by positions for all layers of a decoder or encoder; weight: (buckets, H)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        make = functools.partial(
            buckets, number=config.relative_buckets, max_distance=config.relative_max_distance, causal=config.causal
        )
        self.buckets = Tables(make, 2 * MAX_POSITIONS)
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def forward(self, positions: torch.Tensor, keys: int) -> torch.Tensor:
        """The bias of queries at positions (T,) or (B, T), below `keys`, and keys at 0 to keys - 1: (1 or B, H, T, keys)."""
        (of_offsets,) = self.buckets(2 * keys, self.weight)
        weight = self.weight.float() if is_autocasting(self.weight.device) else self.weight
        by_offset = weight.t()[:, of_offsets]  # (H, offsets)
        offsets = torch.arange(keys, device=positions.device) - positions.unsqueeze(-1)  # (T, keys) or (B, T, keys)
        bias = by_offset[:, offsets + len(of_offsets) // 2]
        return bias.transpose(0, 1) if positions.dim() == 2 else bias.unsqueeze(0)
