"""Checks your own kernel against the numerics contract: fastgpt.testing generates demanding inputs, and knows how accurate results
must be in each dtype. Here the kernel is a few lines of PyTorch; a mask that is off by one is found."""

import torch

from fastgpt.testing import check_attention


def online_attention(q, k, v, window=None, off_by=0):
    """Attention over blocks of keys with a running maximum and sum (online softmax), as in fused kernels; in fp32."""
    T, S, dtype = q.shape[2], k.shape[2], q.dtype
    q, k, v = q.float() / q.shape[-1] ** 0.5, *(x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    largest, total, out = torch.full((*q.shape[:3], 1), -1e30), 0.0, 0.0
    for begin in range(0, S, 16):
        keys = torch.arange(begin, min(begin + 16, S))
        distance = torch.arange(T).view(-1, 1) + S - T - keys  # from a key to the position of the query
        hidden = (distance < off_by) if window is None else (distance < off_by) | (distance >= window)
        scores = (q @ k[:, :, keys].mT).masked_fill(hidden, -torch.inf)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, rescale = (scores - largest).exp(), (before - largest).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + weights @ v[:, :, keys]
    return (out / total).to(dtype)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_attention(online_attention, dtype=dtype)
        check_attention(online_attention, "window", dtype=dtype, shape=(2, 8, 2, 5, 300, 64))  # B, H, H_kv, T, S, D
        print(f"{dtype}: passes, gradients included")
    try:
        check_attention(lambda *qkv: online_attention(*qkv, off_by=1))
    except AssertionError as error:
        print(f"a mask that is off by one: {error}")
