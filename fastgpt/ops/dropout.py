"""Dropout's random numbers: a function of a seed and an element's index, the same in every implementation and pass.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the seed as key. The weight of key
j for query i of head h in sequence b is kept if word j % 4 of the block at counter (j // 4, i, h, b), without its last
bit, is at least p · 2^31.
"""

import torch

_MASK = 0xFFFFFFFF


def philox(seed: torch.Tensor, c0, c1, c2, c3):
    """Four tensors of 32-bit words as int64, for a seed and counters of int64 tensors that broadcast."""
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: the bits are right, whatever the sign
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def keep_threshold(p: float) -> int:
    """Words without their last bit are dropped below it: numbers of 31 bits, which are int32 everywhere."""
    return min(round(p * 2**31), 2**31 - 1)


def keep_mask(seed: torch.Tensor, p: float, B: int, H: int, T: int, S: int, device, first=0) -> torch.Tensor:
    """(B, H, T, S) bool: which weights are kept, of the sequences from number `first` on."""
    b, h, i, j = (torch.arange(n, device=device) for n in (B, H, T, -(-S // 4)))
    counter = (j.view(1, 1, 1, -1), i.view(1, 1, -1, 1), h.view(1, -1, 1, 1), (b + first).view(-1, 1, 1, 1))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, *counter)), dim=-1)  # (B, H, T, S/4, 4)
    return words.flatten(-2)[..., :S] >> 1 >= keep_threshold(p)


def seed_tensor(seed: int | torch.Tensor | None, device) -> torch.Tensor:
    """(1,) int64 on the device; of None, a draw from PyTorch's CPU generator, which torch.manual_seed makes repeatable."""
    if seed is None:
        seed = torch.randint(2**62, (1,))
    return seed.to(device) if isinstance(seed, torch.Tensor) else torch.tensor([seed], device=device)
