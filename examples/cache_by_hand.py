"""A decode loop with a KV cache of your own: rope_kv_cache_update rotates the query and key of a token and stores its key and value
in place, and attention reads the cache. The result equals attention over the whole sequence at once."""

import torch

import fastgpt

B, H, H_kv, D, CAPACITY = 2, 8, 2, 64, 32


def rotary_tables(positions: int, theta: float = 10000.0):
    """cos and sin (positions, D/2), fp32."""
    angles = torch.outer(torch.arange(positions), theta ** (-torch.arange(0, D, 2) / D))
    return angles.cos(), angles.sin()


def decode(q, k, v, cos, sin):
    """Attention of q (B, H, T, D) to k and v (B, H_kv, T, D), one token at a time, as in a decode loop. Returns out and the keys."""
    k_cache, v_cache = torch.zeros(B, H_kv, CAPACITY, D), torch.zeros(B, H_kv, CAPACITY, D)
    outs = []
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        positions = torch.full((B, 1), t)
        rotated = fastgpt.rope_kv_cache_update(
            q[:, :, token], k[:, :, token], v[:, :, token], k_cache, v_cache, positions, cos, sin
        )
        lengths = torch.full((B,), t + 1, dtype=torch.int32)  # number of valid keys in the cache
        outs.append(fastgpt.attention(rotated, k_cache, v_cache, kv_lengths=lengths))
    return torch.cat(outs, dim=2), k_cache


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 20, D), torch.randn(B, H_kv, 20, D), torch.randn(B, H_kv, 20, D)
    cos, sin = rotary_tables(CAPACITY)
    out, k_cache = decode(q, k, v, cos, sin)

    # The whole sequence in one call.
    positions = torch.arange(20).expand(B, 20)
    k_rotated = torch.zeros_like(k)
    q_rotated = fastgpt.rope_kv_cache_update(q, k, v, k_rotated, torch.zeros_like(v), positions, cos, sin)
    expected = fastgpt.attention(q_rotated, k_rotated, v)
    torch.testing.assert_close(out, expected)
    assert torch.equal(k_cache[:, :, :20], k_rotated)
    difference = (out - expected).abs().max()
    print(f"20 tokens one by one and all at once differ by at most {difference:.1e}")
