"""A call of each operation that `fastgpt.explain` knows, as generation makes it."""

from collections.abc import Callable

import torch

import fastgpt
from fastgpt.generation.decoding import decoding
from fastgpt.model.config import GPTConfig
from fastgpt.model.decoder import GPT


def example_calls(device: torch.device) -> dict[Callable, tuple]:
    """Operation -> its arguments, of one token and tiny sizes."""
    x = torch.zeros(1, 1, 1, 16, device=device)
    tiny = GPT(GPTConfig(vocab_size=16, context_length=16, num_layers=1, num_heads=1, hidden_size=16)).to(device)
    positions, ends = (torch.tensor(row, dtype=torch.int32, device=device) for row in ([[0]], [0, 1]))
    angles = x[0, 0, :, :8]
    return {
        fastgpt.attention: (x, x, x),
        fastgpt.attention_varlen: (x[0], x[0], x[0], ends, ends, 1, 1),
        fastgpt.attention_with_kv_cache: (x, x, x, x, x, positions),
        fastgpt.kv_cache_update: (x, x, x, x, positions),
        fastgpt.rope_kv_cache_update: (x, x, x, x, x, positions, angles, angles),
        fastgpt.linear: (x, x[0, 0]),
        fastgpt.route: (x, 1),
        fastgpt.moe: (x, positions[None, None], x[..., :1], x.new_zeros(1, 32, 16), x.new_zeros(1, 16, 16)),
        fastgpt.norm: (x, x[0, 0, 0]),
        fastgpt.scaled_dot_product_attention: (x, x, x),
        decoding: (tiny, tiny.new_cache(1)),
    }
