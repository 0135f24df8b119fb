"""Random arguments for each feature of attention, and for all of them together."""

from collections.abc import Callable

import torch

from fastgpt.testing.draws import normal


def inputs(
    B: int,
    H: int,
    H_kv: int,
    T: int,
    S: int,
    D: int | tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q (B, H, T, D), k (B, H_kv, S, D) and v (B, H_kv, S, D_v), the same on every machine.

    Args:
        D: head dim; or a pair (D, D_v), if values have another one.
        dtype, device: of the tensors.
        seed: of the random numbers.

    Returns: q, k, v.
    """
    D, D_v = D if isinstance(D, tuple) else (D, D)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return normal(shape, generator).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D_v)


def options(
    feature: str, B: int, H: int, T: int, S: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1
) -> dict:
    """Random arguments of `fastgpt.attention` that exercise a feature, the same on every machine.

    Args:
        feature: one of FEATURES.
        B, H, T, S: batch size, query heads, queries and keys.
        dtype, device: of q.
        seed: of the random numbers.

    Returns: a dict of keyword arguments.
    Raises: KeyError for another feature.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return normal(shape, generator).to(dtype)

    def with_infinities(bias):
        """With -inf for single keys, for the first two thirds of the keys of some rows, and for whole rows."""
        B, H, T, S = bias.shape
        hidden = torch.rand(bias.shape, generator=generator, device=device) < 0.4
        hidden[..., : 2 * S // 3] |= torch.rand((B, H, T, 1), generator=generator, device=device) < 0.3
        hidden |= torch.rand((B, H, T, 1), generator=generator, device=device) < 0.2
        return bias.masked_fill(hidden, -torch.inf)

    def mask():
        return torch.rand((B, 1, T, S), generator=generator, device=device) < 0.6

    slopes = 2.0 ** -torch.arange(1, H + 1, device=device, dtype=torch.float32)
    lengths = torch.tensor([(S * i + S // 3) // B % (S + 1) for i in range(B)], dtype=torch.int32, device=device)
    dropout_seed = torch.tensor([(7 << 40) + 5], device=device)
    makers: dict[str, Callable[[], dict]] = {
        "plain": dict,
        "not causal": lambda: {"causal": False},
        "scale": lambda: {"scale": 0.7},
        "window": lambda: {"window": max(S // 4, 1)},
        "window, not causal": lambda: {"window": max(S // 4, 1), "causal": False},
        "softcap": lambda: {"softcap": 1.5, "scale": 0.7},
        "alibi": lambda: {"alibi_slopes": slopes},
        "sinks": lambda: {"sinks": random(H)},
        "mask": lambda: {"mask": mask(), "causal": False},
        "bias": lambda: {"bias": random(B, H, T, S)},
        "bias of heads": lambda: {"bias": random(H, T, S)},
        "bias of keys": lambda: {"bias": random(B, 1, 1, S)},
        "bias of queries": lambda: {"bias": random(1, H, T, 1)},
        "bias with -inf": lambda: {"bias": with_infinities(random(B, H, T, S))},
        "bias of keys with -inf": lambda: {"bias": with_infinities(random(B, 1, 1, S)), "sinks": random(H)},
        "lengths": lambda: {"kv_lengths": lengths},
        "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": dropout_seed},
        "everything": lambda: {
            "window": S // 2 + 3, "softcap": 3.0, "alibi_slopes": slopes, "sinks": random(H), "mask": mask(),
            "bias": with_infinities(random(1, H, T, S)), "kv_lengths": lengths, "dropout_p": 0.2, "dropout_seed": dropout_seed,
        },
    }  # fmt: skip
    return makers[feature]()


FEATURES = [
    "plain", "not causal", "scale", "window", "window, not causal", "softcap", "alibi", "sinks", "mask", "bias",
    "bias of heads", "bias of keys", "bias of queries", "bias with -inf", "bias of keys with -inf", "lengths", "dropout",
    "everything",
]  # fmt: skip
PACKED_FEATURES = ["plain", "not causal", "window", "softcap", "alibi", "sinks", "scale", "dropout"]


def paged(x: torch.Tensor, page: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies keys or values x (B, H, S, ...) to a pool of pages in random order.

    Args:
        x: keys, values or scales.
        page: tokens in a page.
        seed: of the order of pages.

    Returns: the pool (num_pages, H, page, ...), with NaN where no token is, and the block table (B, pages) int32.
    """
    B, H, S = x.shape[:3]
    pages = -(-S // page)
    table = torch.randperm(B * pages + 3, generator=torch.Generator().manual_seed(seed))[: B * pages].view(B, pages)
    unused = torch.nan if x.is_floating_point() else 0
    pool = torch.full((B * pages + 3, page, H, *x.shape[3:]), unused, device=x.device).to(x.dtype).transpose(1, 2)
    for b in range(B):
        for i in range(pages):
            rows = x[b, :, i * page : (i + 1) * page]
            pool[table[b, i], :, : rows.shape[1]] = rows
    return pool, table.int().to(x.device)
