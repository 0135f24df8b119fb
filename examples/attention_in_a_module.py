"""fastgpt.attention in an nn.Module of your own: causal self-attention with a sliding window and grouped-query heads, trained for
a few steps on a sequence that repeats. Gradients come from the kernels."""

import torch
from torch import nn

import fastgpt


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, window: int):
        super().__init__()
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(width, width)

    def forward(self, x):  # (B, T, C)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, T, D), a view
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return self.out(fastgpt.attention(q, k, v, window=self.window).transpose(1, 2).flatten(2))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 32), SelfAttention(32, heads=4, kv_heads=2, window=8), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(65).remainder(10).repeat(8, 1)  # (B, T + 1)
    for step in range(31):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}")
