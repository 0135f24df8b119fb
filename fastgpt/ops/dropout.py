"""The random numbers of dropout: a function of the seed and an element's index, the same in every implementation and pass.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the seed as key. The weight of key
j for query i of head h in sequence b is kept if word j % 4 of the block with counter (j // 4, i, h, b), shifted right by one
bit, is at least p · 2^31.
"""

import torch

_MASK = 0xFFFFFFFF


def philox(
    seed: torch.Tensor, c0: int | torch.Tensor, c1: int | torch.Tensor, c2: int | torch.Tensor, c3: int | torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Four tensors of 32-bit words, as int64, for an int64 seed and int64 counters that broadcast."""
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: the bits are right, whatever the sign
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3  # type: ignore[return-value]  # tensors, after a round


def keep_threshold(p: float) -> int:
    """Weights whose words, shifted right by one bit, are below it are dropped: 31 bits, so that int32 holds them."""
    return min(round(p * 2**31), 2**31 - 1)


def keep_mask(
    seed: torch.Tensor, p: float, B: int, H: int, T: int, S: int, device: torch.device | str, first: int = 0
) -> torch.Tensor:
    """Which weights are kept, (B, H, T, S) bool; first: index of the first sequence."""
    b, h, i, j = (torch.arange(n, device=device) for n in (B, H, T, -(-S // 4)))
    counter = (j.view(1, 1, 1, -1), i.view(1, 1, -1, 1), h.view(1, -1, 1, 1), (b + first).view(-1, 1, 1, 1))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, *counter)), dim=-1)  # (B, H, T, S/4, 4)
    return words.flatten(-2)[..., :S] >> 1 >= keep_threshold(p)


def seed_tensor(seed: int | torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """The seed as a (1,) int64 tensor on the device; None draws one from PyTorch's CPU generator (torch.manual_seed)."""
    if seed is None:
        seed = torch.randint(2**62, (1,))
    return seed.to(device) if isinstance(seed, torch.Tensor) else torch.tensor([seed], device=device)
