"""The features of attention, one by one and together, as random arguments."""

import torch

from fastgpt.testing.draws import normal


def inputs(B, H, H_kv, T, S, D, dtype, device="cpu", seed=0):
    """Random q (B, H, T, D), k and v (B, H_kv, S, D). For v of another head dim, D is a pair: that of q and k, and v's."""
    D, D_v = D if isinstance(D, tuple) else (D, D)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return normal(shape, generator).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D_v)


def options(feature, B, H, T, S, dtype, device="cpu", seed=1):
    """The arguments of a feature, by name, for inputs of these sizes: those of `fastgpt.attention`."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return normal(shape, generator).to(dtype)

    def hiding(bias):
        """With -inf for some keys, from the first on for most of them, and in whole rows."""
        B, H, T, S = bias.shape
        hidden = torch.rand(bias.shape, generator=generator, device=device) < 0.4
        hidden[..., : 2 * S // 3] |= torch.rand((B, H, T, 1), generator=generator, device=device) < 0.3
        hidden |= torch.rand((B, H, T, 1), generator=generator, device=device) < 0.2
        return bias.masked_fill(hidden, -torch.inf)

    def mask():
        return torch.rand((B, 1, T, S), generator=generator, device=device) < 0.6

    slopes = 2.0 ** -torch.arange(1, H + 1, device=device, dtype=torch.float32)
    lengths = torch.tensor([(S * i + S // 3) // B % (S + 1) for i in range(B)], dtype=torch.int32, device=device)
    seed = torch.tensor([(7 << 40) + 5], device=device)
    return {
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
        "hiding bias": lambda: {"bias": hiding(random(B, H, T, S))},
        "hiding bias of keys": lambda: {"bias": hiding(random(B, 1, 1, S)), "sinks": random(H)},
        "lengths": lambda: {"kv_lengths": lengths},
        "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": seed},
        "everything": lambda: {
            "window": S // 2 + 3, "softcap": 3.0, "alibi_slopes": slopes, "sinks": random(H), "mask": mask(),
            "bias": hiding(random(1, H, T, S)), "kv_lengths": lengths, "dropout_p": 0.2, "dropout_seed": seed,
        },
    }[feature]()  # fmt: skip


FEATURES = [
    "plain", "not causal", "scale", "window", "window, not causal", "softcap", "alibi", "sinks", "mask", "bias",
    "bias of heads", "bias of keys", "bias of queries", "hiding bias", "hiding bias of keys", "lengths", "dropout",
    "everything",
]  # fmt: skip
PACKED_FEATURES = ["plain", "not causal", "window", "softcap", "alibi", "sinks", "scale", "dropout"]


def paged(x, page, seed=0):
    """x (B, H, S, ...) as a pool of pages in random order, (pages, H, page, ...), and its block table (B, pages).

    Where no key is, there is NaN.
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
