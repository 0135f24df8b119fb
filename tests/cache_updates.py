"""Arguments of kv_cache_update and rope_kv_cache_update, for tests and for benchmarks.numerics."""

import torch

SENTINEL = -77.0  # what an update must not touch
WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


def update_inputs(B, H, T, S, D, dtype, layout="head-major", cache_dtype=None, page=None, D_v=None):
    """Random arguments of kv_cache_update on the CPU, as a dict. D_v: head dim of values, if another than D."""

    def tensor(*sizes):
        B, H, N, D = sizes
        x = torch.randn(sizes) if layout == "head-major" else torch.randn(B, N, H, D).transpose(1, 2)
        return x.to(dtype)

    cache_dtype = dtype if cache_dtype is None else cache_dtype
    sizes = {"k": D, "v": D if D_v is None else D_v}
    slots = torch.stack([torch.randperm(S)[:T] for _ in range(B)])
    arguments = {name: tensor(B, H, T, size) for name, size in sizes.items()}
    arguments["positions"] = slots.masked_fill(torch.rand(B, T) < 0.2, -1).int()
    first, rows = B, S
    if page:
        pages = -(-S // page)
        first, rows = B * pages + 1, page
        arguments["block_table"] = torch.randperm(first)[: B * pages].view(B, pages).int()
    for name, size in sizes.items():
        arguments[f"{name}_cache"] = torch.full((first, H, rows, size), SENTINEL).to(cache_dtype)
    if cache_dtype.itemsize == 1:
        for name in ("k_scale", "v_scale"):
            arguments[name] = torch.full((first, H, rows), SENTINEL)
    return arguments


def angles(positions, pairs):
    """cos, sin (positions, pairs) as of rotary embedding."""
    x = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return x.cos(), x.sin()


def on(device, arguments):
    """A copy of the arguments there."""
    return {name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def differing(actual, expected) -> list[str]:
    """The caches and scales that are not the expected ones, bit for bit."""
    names = [name for name in WRITTEN if expected.get(name) is not None]
    whole = torch.contiguous_format
    bits = [[x[name].cpu().clone(memory_format=whole).view(torch.uint8) for name in names] for x in (actual, expected)]
    return [name for name, a, b in zip(names, *bits) if not torch.equal(a, b)]
