"""The Triton kernel of attention over a long cache against the reference.

Tests that run the kernel need a GPU or Triton's interpreter, see interpreter.py.
"""

import functools
import math

import pytest
import torch

triton = pytest.importorskip("triton")

from interpreter import DEVICE, one_of_interpreted, passed, runs_kernel, starts_the_interpreter  # noqa: E402

from fastgpt.kernels import attention_decode as kernel  # noqa: E402
from fastgpt.kernels import tiles  # noqa: E402
from fastgpt.kernels.tiles import keys_per_split  # noqa: E402
from fastgpt.ops import attention as ops  # noqa: E402
from fastgpt.ops.attention import attention_reference  # noqa: E402
from fastgpt.ops.attention.operators import attention_forward_triton  # noqa: E402
from fastgpt.ops.attention.reference import reference_of  # noqa: E402
from fastgpt.ops.quantization import quantize  # noqa: E402
from fastgpt.testing.attention_features import paged  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
NAN = float("nan")


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of 32 keys in steps of 16, so that small inputs have several."""
    smaller = {key: [tile._replace(BLOCK_N=16, SPLIT=32) for tile in pair] for key, pair in tiles.DECODE.items()}
    monkeypatch.setattr(tiles, "DECODE", smaller)
    kernel.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()
    yield
    kernel.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()


def random_inputs(B, H, H_kv, T, S, D, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def slopes_of(n_heads):
    return 0.5 ** torch.arange(1, n_heads + 1, dtype=torch.float32, device=DEVICE)


def sinks_of(n_heads, dtype=torch.float32):
    return torch.linspace(-2.0, 3.0, n_heads, device=DEVICE).to(dtype)


def poison(k, v, lengths):
    """NaN wherever nothing may be read."""
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = NAN


def assert_parity(q, k, v, *, causal=True, scale=None, **options):
    """Runs the kernel on (q, k, v) and holds out and lse to the numerics contract. Returns both."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = dict(causal=causal, scale=scale, **options)
    out, lse = kernel.attention_decode(q, k, v, **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    exact = {"bias": options["bias"].double()} if options.get("bias") is not None else {}
    double = [x if x.dtype in EIGHT_BITS else x.double() for x in (q, k, v)]
    check((out, lse), lambda: attention_reference(*double, **options | exact, return_lse=True), weights=q.dtype)
    return out, lse


# B, H, H_kv, T, S, D, lengths; with splits of 32 keys
CASES = {
    "one query, one key": (1, 1, 1, 1, 1, 16, None),
    "one split": (2, 4, 1, 1, 30, 64, None),
    "several splits": (2, 3, 1, 1, 100, 80, None),
    "whole splits": (1, 4, 4, 1, 64, 40, None),
    "ragged": (5, 3, 1, 1, 97, 40, (0, 97, 1, 32, 33)),
    "three queries": (2, 4, 1, 3, 70, 64, (70, 41)),
    "more rows than the short tile": (2, 8, 2, 5, 40, 16, (2, 40)),
    "two tiles of rows": (1, 14, 1, 5, 40, 16, None),
    "more queries than keys": (1, 1, 1, 5, 3, 128, None),
    "more queries than length": (3, 3, 3, 5, 50, 16, (3, 4, 50)),
    "head dim 128": (1, 4, 1, 1, 70, 128, None),
    "head dim 256": (1, 3, 1, 1, 70, 256, (65,)),
    "head dim 1": (1, 1, 1, 1, 20, 1, None),
    "many splits": (1, 1, 1, 1, 550, 16, None),
    "no keys": (2, 1, 1, 3, 0, 16, None),
    "no queries": (2, 1, 1, 0, 8, 16, None),
    "no batch": (0, 1, 1, 1, 8, 16, None),
}


@runs_kernel
@one_of_interpreted(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, short_splits):
    *shape, lengths = case
    q, k, v = random_inputs(*shape, dtype)
    if lengths is not None:
        poison(k, v, lengths)
    assert_parity(q, k, v, kv_lengths=None if lengths is None else ints(lengths))


# A tile of 64 keys and splits of 256, and a larger one for more rows.
FEW, MANY = tiles.DECODE[128, 2][1]._replace(BLOCK_N=64, SPLIT=256), tiles.DECODE[128, 2][0]._replace(BLOCK_N=64, SPLIT=1024)


@pytest.mark.parametrize(
    "tile, row_tiles, n_keys, n_multiprocessors, expected",
    [
        (FEW, 8, 2048, 132, 64),  # one sequence, 8 key/value heads: 256 programs, where 256 keys each would be 64
        (FEW, 8, 2048, 64, 256),
        (FEW, 8, 2048, 65, 128),
        (FEW, 64, 2048, 132, 256),
        (FEW, 1, 64, 132, 64),  # no more programs than tiles of keys
        (FEW, 1, 0, 132, 64),
        (MANY, 8, 8192, 132, 256),  # more rows leave more to combine
        (MANY, 200, 100, 132, 1024),
        (FEW._replace(BLOCK_N=16), 1, 2048, 132, 64),  # and none for a few keys
        (FEW._replace(BLOCK_N=128), 1, 2048, 132, 128),
    ],
)  # fmt: skip
def test_splits_fill_the_multiprocessors(tile, row_tiles, n_keys, n_multiprocessors, expected):
    assert keys_per_split(tile, row_tiles, n_keys, n_multiprocessors) == expected


@runs_kernel
@pytest.mark.parametrize("n_multiprocessors, split", ((1, 256), (5, 128), (132, 64)))
def test_parity_of_splits_for_any_number_of_multiprocessors(n_multiprocessors, split, monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: n_multiprocessors)
    q, k, v = random_inputs(1, 4, 2, 1, 300, 16, torch.float16)
    tile = tiles.decode_tile(16, 16, 2, 90, False, True, False, False)
    assert keys_per_split(tile, 2, 300, n_multiprocessors) == split
    for options in {}, {"window": 90}:
        assert_parity(q, k, v, kv_lengths=ints((290,)), **options)


@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("T", (1, 16))
@pytest.mark.parametrize("name", ("mask", "bias"))
def test_few_queries_with_a_mask_or_a_bias_are_split_over_keys(name, T, dtype, monkeypatch):
    """As without: 300 keys among five programs of 64 for each head of the keys."""
    grids, launch = [], kernel.attend_split_kernel.launch
    monkeypatch.setattr(kernel.attend_split_kernel, "launch", lambda grid, *args: grids.append(grid) or launch(grid, *args))
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132)
    q, k, v = random_inputs(2, 4, 2, T, 300, 16, dtype)
    hidden = one_in_three_hidden(torch.empty(2, 1, T + 1, 300))[..., :T, :]  # and of the second query all, if there is one
    scores = torch.randn(2, 1, T, 300, device=DEVICE).to(dtype)
    call = ops.Call(q, k, v, scale=0.25, **{name: ~hidden if name == "mask" else scores.masked_fill(hidden, -math.inf)})
    results = attention_forward_triton(*call)
    assert grids == [(5 * 2 * 2, 1, 1)]
    double = (x.double() if torch.is_tensor(x) and x.dtype == dtype else x for x in call)
    check(results, lambda call=ops.Call(*double): reference_of(call, return_lse=True), weights=dtype)


@runs_kernel
@pytest.mark.parametrize("D", (64, 128))
def test_parity_of_the_tiles_that_ship(D):
    q, k, v = random_inputs(2, 4, 2, 2, 300, D, torch.float16)
    assert_parity(q, k, v, kv_lengths=ints((300, 70)))


@runs_kernel
@pytest.mark.parametrize("D, D_v, dtype, cache_dtype", (
    (192, 128, torch.float16, None), (192, 128, torch.float32, torch.int8), (576, 512, torch.float16, torch.float8_e4m3fn),
    (20, 90, torch.float16, None), (160, 16, torch.float32, None), (64, 576, torch.bfloat16, None),
), ids=str)  # fmt: skip
def test_values_of_another_head_dim(D, D_v, dtype, cache_dtype, short_splits):
    q, k, _ = random_inputs(2, 4, 2, 1, 70, D, dtype)
    v = torch.randn(2, 2, 70, D_v, device=DEVICE).to(dtype)
    lengths, options = (70, 33), {}
    if cache_dtype is None:
        poison(k, v, lengths)
    else:
        (k, options["k_scale"]), (v, options["v_scale"]) = quantize(k, cache_dtype), quantize(v, cache_dtype)
    options |= dict(causal=True, scale=D**-0.5, kv_lengths=ints(lengths))
    out, lse = kernel.attention_decode(q, k, v, **options)
    assert out.shape == (2, 4, 1, D_v) and out.transpose(1, 2).is_contiguous()
    double = (x if x.dtype in EIGHT_BITS else x.double() for x in (q, k, v))
    check((out, lse), lambda call=ops.Call(*double, **options): reference_of(call, return_lse=True), weights=dtype)


@runs_kernel
@pytest.mark.parametrize("D, D_v", ((24, 40), (144, 16)))
def test_a_new_token_with_values_of_another_head_dim(D, D_v, short_splits):
    q, k, _ = random_inputs(2, 4, 2, 1, 70, D, torch.float32)
    v = torch.randn(2, 2, 70, D_v, device=DEVICE)
    lengths, new = (70, 33), (torch.randn(2, 2, 1, D, device=DEVICE), torch.randn(2, 2, 1, D_v, device=DEVICE))
    poison(k, v, [length - 1 for length in lengths])
    options = dict(causal=True, scale=D**-0.5, kv_lengths=ints(lengths))
    slots = ints(lengths).view(2, 1) - 1
    results = kernel.attention_decode(q, k, v, **options, new=kernel.NewToken(*new, slots))
    for cache, row in ((k, new[0]), (v, new[1])):
        assert all(torch.equal(cache[b, :, length - 1], row[b, :, 0]) for b, length in enumerate(lengths))
    call = ops.Call(q.double(), k.double(), v.double(), **options)
    check(results, lambda: reference_of(call, return_lse=True), weights=torch.float32)


# Tensors are functions of the number of heads.
FEATURES = {
    "not causal": dict(causal=False),
    "window 1": dict(window=1),
    "window": dict(window=37),
    "window beyond all keys": dict(window=2**40),
    "window, not causal": dict(window=20, causal=False),
    "softcap": dict(softcap=2.0),
    "alibi": dict(alibi_slopes=slopes_of),
    "sinks": dict(sinks=sinks_of),
    "all": dict(window=50, softcap=3.0, alibi_slopes=slopes_of, sinks=functools.partial(sinks_of, dtype=torch.float16)),
}


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("dtype, S", ((torch.float16, 25), (torch.float32, 90)), ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_parity_of_features(dtype, options, S, short_splits):
    options = {name: value(6) if callable(value) else value for name, value in options.items()}
    q, k, v = random_inputs(3, 6, 2, 3, S, 40, dtype)
    lengths = (S, 2, S // 2)  # of the second sequence, the first query sees nothing
    poison(k, v, lengths)
    out, lse = assert_parity(3.0 * q, k, v, kv_lengths=ints(lengths), **options)
    if options.get("causal", True):
        assert not out[1, :, 0].any() and (lse[1, :, 0] == -math.inf).all()


def one_in_three_hidden(x):
    """Some keys of a row, the first of all rows, and all of one row."""
    hidden = torch.arange(x.numel(), device=DEVICE).view(x.shape) % 3 == 1
    hidden[..., 0] = hidden[..., 1, :] = True
    return hidden


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("dtype, S", ((torch.float32, 25), (torch.float16, 96)), ids=str)  # rows of 96 are aligned
@pytest.mark.parametrize("layout", ("rows", "columns", "of keys", "of queries", "of heads"))
def test_parity_of_masks_and_biases(layout, S, dtype, short_splits):
    """Of any strides; where a bias is -inf it hides a key, whatever that is."""
    B, H, T = 2, 4, 2
    shape = {"of keys": (B, 1, 1, S), "of queries": (B, H, T, 1), "of heads": (H, 1, 1)}.get(layout, (B, H, T, S))
    whole = torch.randn(B, H, T, S, device=DEVICE)
    whole.masked_fill_(one_in_three_hidden(whole), -math.inf)
    bias = whole[tuple(slice(n) for n in (1, 1, 1, 1)[len(shape) :] + shape)].reshape(shape).to(dtype)
    if layout == "columns":
        bias = bias.mT.contiguous().mT
    q, k, v = random_inputs(B, H, 2, T, S, 40, dtype)
    for options in ({"mask": bias > 0.0}, {"bias": bias, "sinks": sinks_of(H)}):
        lengths = (S, S // 2)
        poison(k, v, lengths)
        out, lse = assert_parity(q, k, v, kv_lengths=ints(lengths), causal=layout != "rows", **options)
        if layout == "rows":
            assert not out[:, :, 1].any() and (lse[:, :, 1] == -math.inf).all()
    if layout == "rows":  # a key that nobody sees
        options = dict(causal=True, scale=0.25, bias=bias, kv_lengths=ints(lengths))
        decode = functools.partial(kernel.attention_decode, q, k, v, **options)
        expected = decode()
        k[:, :, 0] = NAN
        for actual, wanted in zip(decode(), expected, strict=True):
            assert torch.equal(actual, wanted)


@runs_kernel
@pytest.mark.parametrize("cache", (torch.float16, torch.float32, torch.int8), ids=str)
@pytest.mark.parametrize("how", ("mask", "bias", "window"))
def test_masked_values_do_not_affect_the_output(how, cache, short_splits):
    """Whatever it is, or its scale. One that a query sees is seen."""
    S, keys = 99, [0, 17, 60]
    q, k, v = random_inputs(1, 4, 2, 3, S, 40, torch.float16 if cache is torch.int8 else cache)
    mask = torch.rand(3, S, device=DEVICE) < 0.7
    mask[:, keys], mask[:, 98] = False, True
    options = {
        "mask": {"mask": mask}, "bias": {"bias": torch.zeros(3, S, device=DEVICE).masked_fill(~mask, -math.inf)},
        "window": {"window": 30},
    }[how]  # fmt: skip
    options |= {"causal": True, "scale": 0.2}
    if cache is torch.int8:
        (k, k_scale), (v, v_scale) = quantize(k, cache), quantize(v, cache)
        options |= {"k_scale": k_scale, "v_scale": v_scale}
    changed = [k_scale, v_scale] if cache is torch.int8 else [k, v]
    expected = kernel.attention_decode(q, k, v, **options)
    for number in (NAN, math.inf):
        for x in changed:
            x[:, :, keys] = number
        actual = kernel.attention_decode(q, k, v, **options)
        assert all(torch.equal(x, wanted) for x, wanted in zip(actual, expected, strict=True))
    changed[-1][:, :, 98] = NAN
    assert kernel.attention_decode(q, k, v, **options)[0][:, :, 2].isnan().all()


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ({}, {"window": 90}, {"sinks": (0.5, -1.0)}), ids=str)
def test_scores_of_minus_infinity_hide_keys(options, dtype, short_splits):
    """Whole first splits of them, without a bias, and all of a sequence."""
    hidden = 130
    q, k, v = random_inputs(2, 2, 1, 3, 150, 16, dtype)
    q, k[0, :, :hidden], k[1] = q.abs() + 0.25, -math.inf, -math.inf
    options = {"scale": 0.25, "causal": True} | options
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device=DEVICE)
    out, lse = kernel.attention_decode(q, k, v, **options)
    assert not out[1].any() and (lse[1] == -math.inf).all()
    rest = [x[:1].double() for x in (q, k[:, :, hidden:], v[:, :, hidden:])]
    check((out[:1], lse[:1]), lambda: attention_reference(*rest, **options, return_lse=True), weights=dtype)


@runs_kernel
@pytest.mark.parametrize("scale", (3.0, 0.0, -0.5))
@pytest.mark.parametrize("softcap", (None, 1.5))
def test_parity_at_any_scale(scale, softcap, short_splits):
    q, k, v = random_inputs(1, 2, 1, 2, 40, 64, torch.float32)
    assert_parity(q, k, v, scale=scale, softcap=softcap)


@runs_kernel
def test_large_scores_do_not_overflow(short_splits):
    q, k, v = random_inputs(1, 2, 1, 2, 70, 64, torch.float32)
    out, _ = assert_parity(1e4 * q, k, v, sinks=sinks_of(2))
    assert out.isfinite().all()


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("page", (1, 16, 33))
@pytest.mark.parametrize("window", (None, 40))
def test_parity_on_pages(page, window, short_splits):
    q, k, v = random_inputs(3, 4, 2, 3, 99, 64, torch.float16)
    lengths = (99, 50, 0)
    poison(k, v, lengths)
    (k, block_table), (v, _) = paged(k, page), paged(v, page)
    expected = assert_parity(q, k, v, block_table=block_table, kv_lengths=ints(lengths), window=window)
    for b, length in enumerate(lengths):  # pages that hold no key may be any, without and with contents
        first = 0 if window is None else max(0, length - 3 - window + 1) // page
        used = torch.zeros(block_table.shape[1], dtype=torch.bool, device=DEVICE)
        used[first : triton.cdiv(length, page)] = True
        garbage = ints([2**31 - 1, -(2**31), -1, k.shape[0] - 1]).repeat(triton.cdiv(len(used), 4))[: len(used)]
        block_table[b] = torch.where(used, block_table[b], garbage)
    actual = kernel.attention_decode(
        q, k, v, causal=True, scale=0.125, block_table=block_table, kv_lengths=ints(lengths), window=window
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@runs_kernel
@one_of_interpreted(3)
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", (40, 128))
def test_parity_on_8_bits(dtype, cache_dtype, D, short_splits):
    q, k, v = random_inputs(2, 6, 2, 1, 70, D, dtype)
    k, k_scale = quantize(k, cache_dtype)
    v, v_scale = quantize(v, cache_dtype)
    lengths = (70, 33)
    poison(k_scale, v_scale, lengths)
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale, kv_lengths=ints(lengths))


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("magnitudes", ((1e-4, 1e-4), (6e4, 6e4), (1e-4, 6e4), (6e4, 1e-4)))
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_8_bits_of_any_magnitude(cache_dtype, magnitudes, short_splits):
    """v_scale times a weight is a number that fp16 may not have, and the largest v_scale may be any key's."""
    q, k, v = random_inputs(1, 4, 1, 1, 70, 64, torch.float16)
    k, k_scale = quantize(k, cache_dtype)
    first, last = map(math.log, magnitudes)
    v, v_scale = quantize(v.float() / v.float().abs().max() * torch.linspace(first, last, 70).exp()[:, None], cache_dtype)
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale)


@runs_kernel
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_parity_of_everything(cache_dtype, short_splits):
    q, k, v = random_inputs(3, 6, 2, 3, 99, 80, torch.float16)
    k, k_scale = quantize(k, cache_dtype)
    v, v_scale = quantize(v, cache_dtype)
    lengths = (99, 50, 2)
    poison(k_scale, v_scale, lengths)
    pools = [paged(x.view(torch.int8) if x.dtype in EIGHT_BITS else x, 16) for x in (k, v, k_scale, v_scale)]
    (k, block_table), (v, _), (k_scale, _), (v_scale, _) = pools
    assert_parity(
        q, k.view(cache_dtype), v.view(cache_dtype), k_scale=k_scale, v_scale=v_scale, block_table=block_table,
        kv_lengths=ints(lengths), window=60, softcap=3.0, alibi_slopes=slopes_of(6), sinks=sinks_of(6),
    )  # fmt: skip


@runs_kernel
def test_lengths_are_clamped_to_the_capacity(short_splits):
    q, k, v = random_inputs(2, 1, 1, 3, 60, 16, torch.float32)
    k, v = k[:, :, :50], v[:, :, :50]
    beyond = kernel.attention_decode(q, k, v, causal=True, scale=0.25, kv_lengths=ints((59, -70)))
    clamped = kernel.attention_decode(q, k, v, causal=True, scale=0.25, kv_lengths=ints((50, 0)))
    for actual, expected in zip(beyond, clamped, strict=True):
        assert torch.equal(actual, expected)


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("window", (None, 45))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_batch_and_capacity_do_not_change_bits_with_the_same_splits(dtype, window, short_splits):
    q, k, v = random_inputs(3, 4, 2, 2, 99, 64, dtype)
    lengths = (99, 20, 70)
    options = dict(causal=True, scale=0.125, window=window, sinks=sinks_of(4))
    together = kernel.attention_decode(q, k, v, kv_lengths=ints(lengths), **options)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        for capacity in {length, 99}:
            alone = kernel.attention_decode(
                q[one], k[one, :, :capacity], v[one, :, :capacity], kv_lengths=ints((length,)), **options
            )
            for a, t in zip(alone, together, strict=True):
                assert torch.equal(a, t[one])


@runs_kernel
def test_pages_and_plain_caches_agree_to_the_bit(short_splits):
    q, k, v = random_inputs(2, 4, 2, 1, 96, 64, torch.float16)
    plain = kernel.attention_decode(q, k, v, causal=True, scale=0.125)
    (k, block_table), (v, _) = paged(k, 16), paged(v, 16)
    on_pages = kernel.attention_decode(q, k, v, causal=True, scale=0.125, block_table=block_table)
    for actual, expected in zip(on_pages, plain, strict=True):
        assert torch.equal(actual, expected)


def packed(x):  # (B, H, N, D) inside (B, N, 3, H, D), as one projection to q, k and v leaves it
    B, H, N, D = x.shape
    base = torch.full((B, N, 3, H, D), NAN, dtype=x.dtype, device=x.device)
    base[:, :, 1] = x.transpose(1, 2)
    return base[:, :, 1].transpose(1, 2)


def sliced(x):  # out of a larger cache, on aligned addresses
    B, H, N, D = x.shape
    base = torch.full((B + 1, H + 1, N + 7, D + 8), NAN, dtype=x.dtype, device=x.device)
    view = base[1:, 1:, 3 : 3 + N, :D]
    return view.copy_(x)


def misaligned(x):  # rows start between two multiples of 16 bytes
    B, H, N, D = x.shape
    base = torch.full((B, H, N, D + 3), NAN, dtype=x.dtype, device=x.device)
    view = base[..., 1 : 1 + D]
    return view.copy_(x)


def expanded(x):
    return x[:1].expand(x.shape)


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("D", (33, 64))
@pytest.mark.parametrize("view", (packed, sliced, misaligned, expanded))
def test_parity_on_views(view, D, short_splits):
    q, k, v = random_inputs(2, 4, 2, 2, 40, D, torch.float16)
    kv_lengths = ints((40, 40, 20, 20))[::2]
    slopes, sinks = slopes_of(8)[::2], sinks_of(8)[::2]
    assert_parity(view(q), view(k), view(v), kv_lengths=kv_lengths, alibi_slopes=slopes, sinks=sinks)


@runs_kernel
def test_scales_on_views(short_splits):
    q, k, v = random_inputs(2, 4, 2, 1, 40, 64, torch.float16)
    k, k_scale = quantize(k, torch.int8)
    v, v_scale = quantize(v, torch.int8)
    k_scale, v_scale = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (k_scale, v_scale))
    assert_parity(q, k, v, k_scale=k_scale, v_scale=v_scale)


LARGE_CASES = {
    "Llama": (8, 32, 8, 1, 4096, 128, (1, 4096, 17, 64, 65, 2000, 0, 4095)),
    "speculative": (2, 32, 8, 5, 3000, 128, (3000, 1234)),
    "long": (1, 8, 2, 1, 70_000, 64, None),
    "wide head": (2, 8, 1, 1, 2000, 256, (2000, 900)),
    "off-block": (3, 6, 2, 2, 1111, 80, (1111, 0, 600)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", (None, *EIGHT_BITS), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_parity_at_size(case, dtype, cache_dtype):
    *shape, lengths = case
    q, k, v = random_inputs(*shape, dtype)
    options = dict(kv_lengths=None if lengths is None else ints(lengths))
    if cache_dtype is not None:
        k, options["k_scale"] = quantize(k, cache_dtype)
        v, options["v_scale"] = quantize(v, cache_dtype)
    assert_parity(q, k, v, **options)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    q, k, v = random_inputs(3, 2, 2, 1, 48, 64, torch.float16)
    pool = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    far_batch = pool.as_strided(k.shape, (2**30, 48 * 64, 64, 1)).copy_(k)  # batch 2 begins at element 2^31
    assert_parity(q, far_batch, v)
    assert_parity(q, far_batch, v, block_table=ints((2, 0, 1)).view(3, 1))
    far_row = pool.as_strided(k.shape, (64, 192, 3 * 2**24, 1)).copy_(k)  # row 43 begins past element 2^31
    assert_parity(q, far_row, v)


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    q, k, v = random_inputs(2, 4, 2, 1, 1000, 64, torch.float16)
    kv_lengths = ints((1000, 30))
    decode = functools.partial(kernel.attention_decode, q, k, v, causal=True, scale=0.125, kv_lengths=kv_lengths)
    decode()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode()
    kv_lengths.copy_(ints((7, 900)))
    q.neg_()
    graph.replay()
    expected_out, expected_lse = decode()
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


@pytest.mark.slow
@starts_the_interpreter
def test_under_the_interpreter():
    assert passed(__file__) >= len(CASES)
