"""Queries, keys and values of multi-head latent attention (MLA), which are projected from few numbers a token."""

import torch
import torch.nn as nn

from fastgpt.model.config import GPTConfig
from fastgpt.model.fusion import plain
from fastgpt.model.layers import Norm, new_layer, project
from fastgpt.ops.prepend_shared import prepend_shared


@plain(weights=0)
class Latent(nn.Module):
    """Queries, keys and values of all heads from normalized x, through vectors that are normalized, too:

        q = q_b(q_a_norm(q_a(x))), or q(x)                         head dim D
        c, r = kv_a(x)                                             kv_rank, R = rope.dim: all heads have the same
        k, v = kv_b(kv_a_norm(c));  k = (r, k)                     head dims D - R, D_v; D

    The first R dimensions of queries and keys are those that are rotated.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        H, D, C = config.num_heads, config.head_dim, config.hidden_size
        self.kv_rank, self.shared = config.kv_rank, config.rope.dim
        self.num_heads, self.sizes = H, (D - self.shared, config.v_head_dim)
        self.q = self.q_a = self.q_a_norm = self.q_b = None
        if config.q_rank is None:
            self.q = new_layer(nn.Linear, C, H * D, bias=False)
        else:
            self.q_a = new_layer(nn.Linear, C, config.q_rank, bias=config.qkv_bias)
            self.q_a_norm = Norm(config, config.q_rank, config.latent_norm_eps)
            self.q_b = new_layer(nn.Linear, config.q_rank, H * D, bias=False)
        self.kv_a = new_layer(nn.Linear, C, self.kv_rank + self.shared, bias=config.qkv_bias)
        self.kv_a_norm = Norm(config, self.kv_rank, config.latent_norm_eps)
        self.kv_b = new_layer(nn.Linear, self.kv_rank, H * sum(self.sizes), bias=False)

    def forward(self, x: torch.Tensor, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> q and k (B, T, H, D), v (B, T, H, D_v)."""
        q = project(x, self.q, norm) if self.q_b is None else project(project(x, self.q_a, norm), self.q_b, self.q_a_norm)
        latent, shared = project(x, self.kv_a, norm).split((self.kv_rank, self.shared), -1)
        # `linear` would copy the latent, whose rows are apart, and a step could not be recorded; `norm` does not.
        kv = project(self.kv_a_norm(latent), self.kv_b).unflatten(-1, (self.num_heads, -1))  # (B, T, H, D - R + D_v)
        k, v = kv.split(self.sizes, -1)
        return q.unflatten(-1, (self.num_heads, -1)), prepend_shared(shared, k), v
