"""The Triton kernel of the cache update: exact, and what no token is stored in keeps its sentinel.

Tests that run the kernel need a GPU or Triton's interpreter, see interpreter.py.
"""

import random

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from cache_updates import WRITTEN, angles, differing, on, update_inputs  # noqa: E402
from interpreter import DEVICE, INTERPRETED, passed, runs_kernel, starts_the_interpreter  # noqa: E402

from fastgpt.kernels import kv_cache_update as kernel  # noqa: E402
from fastgpt.ops.kv_cache_update import kv_cache_update_reference, rope_kv_cache_update_reference  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
NAN = float("nan")
# Most draws are compiled on their own: on a GPU that would take long.
SEEDS = [*range(24), *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(24, 500 if INTERPRETED else 24))]


def untouched(shape, dtype):
    """A tensor of numbers that no update writes."""
    return torch.full(shape, NAN if dtype == torch.float8_e4m3fn else -77.0).to(dtype)


def laid_out(x, order, padding):
    """x (B, H, N, D) with the same values in another layout: a permutation of the first three dimensions, rows with padding."""
    sizes = [x.shape[i] for i in order]
    storage = untouched((*sizes, x.shape[3] + padding), x.dtype)
    view = storage[..., padding : padding + x.shape[3]].permute(*(order.index(i) for i in range(3)), 3)
    return view.copy_(x)


def random_update(seed):
    """Arguments of kv_cache_update or, mostly, rope_kv_cache_update: any sizes, dtypes, layouts and positions."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B, H, T, S = (draw.randint(least, most) for least, most in ((1, 3), (1, 3), (1, 9), (1, 12)))
    D, D_v = (draw.choice((1, 2, 6, 16, 17, 40, 64, 80)) for _ in range(2))
    rotates = D > 1 and draw.random() < 0.7
    D_v = D if rotates else draw.choice((D, D_v))
    dtype, index = draw.choice(DTYPES), draw.choice((torch.int32, torch.int64))
    cache_dtype, page = draw.choice((dtype, *EIGHT_BITS)), draw.choice((None, 1, 4, 5))
    first, rows, block_table = B, S, None
    if page is not None:
        pages = -(-S // page)
        first, rows, S = B * pages + 2, page, pages * page
        block_table = torch.randperm(first, generator=generator)[: B * pages].view(B, pages).int()
        block_table = draw.choice((block_table, block_table.mT.contiguous().mT))

    def layout():
        return draw.sample(range(3), 3), draw.choice((0, 8, 16, 1, 3))

    def tokens(H, D):  # of very different size, zeros among them
        size = 10.0 ** torch.randint(-6, 4, (B, H, T, 1), generator=generator)
        size *= torch.rand(B, H, T, 1, generator=generator) < 0.9
        return laid_out((torch.randn(B, H, T, D, generator=generator) * size).to(dtype), *layout())

    def cache(D):
        return laid_out(untouched((first, H, rows, D), cache_dtype), *layout())

    k, v, k_cache, v_cache = tokens(H, D), tokens(H, D_v), cache(D), cache(D_v)
    k_scale = v_scale = None
    if cache_dtype != dtype:
        k_scale, v_scale = (laid_out(untouched((first, H, rows, 1), torch.float32), *layout())[..., 0] for _ in range(2))
    slots = torch.stack([torch.randperm(max(S, T), generator=generator)[:T] for _ in range(B)])
    slots = slots.masked_fill((slots >= S) | (torch.rand(B, T, generator=generator) < 0.2), -1).to(index)
    slots = draw.choice((slots, slots.mT.contiguous().mT))
    call = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "positions": slots, "block_table": block_table}
    call |= {"k_scale": k_scale, "v_scale": v_scale}
    if not rotates:
        return call
    q = tokens(H * draw.randint(1, 3), D)
    cos, sin = angles(70, draw.randint(1, D // 2))
    if draw.random() < 0.5:  # stored elsewhere than at the position
        index = draw.choice((torch.int32, torch.int64))
        call |= {"slots": slots, "positions": torch.randint(-1, 70, (B, T), generator=generator).to(index)}
    if draw.random() < 0.3:  # rows of a table that has more of them
        cos, sin = torch.cat([cos, cos], 1)[:, cos.shape[1] :], torch.cat([sin, sin], 1)[:, : sin.shape[1]]
    return call | {"q": q, "cos": cos, "sin": sin, "interleaved": draw.random() < 0.5}


def copied(call):
    """With the memory layouts of what is read and written, padding included."""
    moved = {}
    for name, x in call.items():
        if isinstance(x, torch.Tensor):
            storage = x.new_empty(0).set_(x.untyped_storage().clone()).view(torch.uint8).to(DEVICE).view(x.dtype)
            x = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        moved[name] = x
    return moved


def padding_of(call):
    """Whether what lies between the rows of caches is still there."""
    found = {}
    for name in WRITTEN:
        if (x := call.get(name)) is not None:
            whole = x.new_empty(0).set_(x.untyped_storage()).cpu().view(torch.uint8).clone()
            inside = torch.zeros_like(whole, dtype=torch.bool)
            size = x.element_size()
            bytes_of = inside.as_strided((*x.shape, size), (*(n * size for n in x.stride()), 1), x.storage_offset() * size)
            bytes_of.fill_(True)
            found[name] = whole[~inside]
    return found


def assert_exact(call):
    """The kernel and the reference do the same to copies of what a call has; returns that of the kernel."""
    expected, actual = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.items()}, copied(call)
    before = padding_of(actual)
    if "q" in call:
        expected_q, actual_q = rope_kv_cache_update_reference(**expected), kernel.rope_kv_cache_update(**actual)
        assert actual_q.is_contiguous() and torch.equal(actual_q.cpu(), expected_q)
    else:
        kv_cache_update_reference(**expected)
        assert kernel.kv_cache_update(**actual) is None
    assert not differing(actual, expected)
    for name, x in padding_of(actual).items():
        assert torch.equal(x, before[name]), name
    return actual


@runs_kernel
@pytest.mark.parametrize("seed", SEEDS)
def test_exact(seed):
    assert_exact(random_update(seed))


@runs_kernel
@pytest.mark.parametrize("cache_dtype", [None, *EIGHT_BITS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_a_program_stores(dtype, cache_dtype):
    """Rows as models have them, in several tiles of tokens; the last one is not full."""
    for page, interleaved in ((None, False), (16, True)):
        call = update_inputs(1, 1, 75, 90, 64, dtype, "token-major", cache_dtype, page)
        call |= {"q": torch.randn(1, 75, 2, 64).transpose(1, 2).to(dtype), "interleaved": interleaved}
        call["cos"], call["sin"] = angles(90, 32)
        assert_exact(call)


@runs_kernel
@pytest.mark.parametrize("D, D_v", [(1500, 1030), (3, 2049), (576, 512), (1024, 1)])
def test_rows_of_any_length_are_copied(D, D_v):
    call = update_inputs(1, 2, 3, 5, D, torch.float16)
    for name in ("v", "v_cache"):
        call[name] = torch.randn(1, 2, call[name].shape[2], D_v).half()
    assert_exact(call)


@runs_kernel
@pytest.mark.parametrize("B, H, T, S, D", [(0, 2, 3, 5, 8), (2, 0, 3, 5, 8), (2, 2, 0, 5, 8), (2, 2, 3, 5, 0), (2, 2, 3, 0, 8)])
def test_nothing_to_store(B, H, T, S, D):
    x, cache = torch.randn(B, H, T, D, device=DEVICE), torch.full((B, H, S, D), -77.0, device=DEVICE)
    positions = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
    caches = cache.clone(), cache.clone()
    kernel.kv_cache_update(x, x, *caches, positions)
    stored = caches[0][:, :, :1]
    assert torch.equal(stored, x[:, :, :1] if S and T else cache[:, :, :1])
    if D:
        q, ones = torch.randn(B, 3, T, D, device=DEVICE), torch.ones(4, D // 2, device=DEVICE)
        assert torch.equal(kernel.rope_kv_cache_update(q, x, x, *caches, positions - 1, ones, ones), q)


@runs_kernel
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [None, 4])
def test_tokens_outside_the_cache_are_not_written(page, index):
    inputs = update_inputs(1, 2, 3, 4, 8, torch.float32, page=page)
    far = 2**31 - 1 if index is torch.int32 else 2**33  # which is slot 0 in 32 bits
    outside = on(DEVICE, inputs) | {"positions": torch.tensor([[4, far, -5]], dtype=index, device=DEVICE)}
    kernel.kv_cache_update(**outside)
    assert not differing(outside, inputs)
    if page:
        for wrong in (-1, 2, 2**31 - 1):
            outside = on(DEVICE, inputs) | {"block_table": torch.tensor([[wrong]], dtype=torch.int32, device=DEVICE)}
            kernel.kv_cache_update(**outside)
            assert not differing(outside, inputs)
    x, ones = torch.randn(1, 2, 3, 8, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    outside = on(DEVICE, inputs) | {"positions": torch.tensor([[2, 3, far]], dtype=index, device=DEVICE)}
    slots = torch.tensor([[0, 1, 2]], dtype=index, device=DEVICE)
    for elsewhere in (None, slots):  # without angles a token is not stored, wherever that would be
        assert torch.equal(kernel.rope_kv_cache_update(x, **outside, cos=ones, sin=ones, slots=elsewhere), x)
        assert not differing(outside, inputs)


@runs_kernel
def test_padding_that_has_a_slot_is_stored_as_it_is():
    """A token at a negative position is not rotated, and stored where slots says."""
    call = update_inputs(1, 2, 3, 6, 8, torch.float16)
    call |= {"positions": torch.tensor([[-1, 2, -7]]), "slots": torch.tensor([[5, 0, 3]]), "q": call["k"]}
    call["cos"], call["sin"] = angles(6, 4)
    actual = assert_exact(call)
    assert torch.equal(actual["k_cache"][0, :, 5], actual["k"][0, :, 0])


@runs_kernel
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_cannot_be_quantized(dtype, cache_dtype):
    call = update_inputs(1, 1, 6, 6, 8, dtype, cache_dtype=cache_dtype)
    call["positions"] = torch.arange(6).unsqueeze(0)
    k = call["k"][0, 0]
    k[0, 3], k[1, 0], k[2], k[3], k[4] = NAN, -torch.inf, 0.0, 1e-31, 1e-30
    call["v"][0, 0, 5] = torch.finfo(dtype).max
    actual = assert_exact(call)
    assert actual["k_scale"][0, 0, :2].isnan().all()


@runs_kernel
def test_views_of_one_layer_of_all():
    """k, v and q of one projection; the caches of one layer of a tensor of all."""
    qkv = torch.randn(2, 3, 4 * 16 + 2 * 2 * 16).half()
    q, k, v = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in qkv.split([64, 32, 32], dim=-1))
    caches = torch.full((5, 2, 2, 2, 9, 16), -77.0).half()  # (layers, k and v, B, H_kv, S, D)
    call = {"q": q, "k": k, "v": v, "k_cache": caches[3, 0], "v_cache": caches[3, 1]}
    call["positions"], (call["cos"], call["sin"]) = torch.tensor([[0, 1, 2], [6, 7, 8]]), angles(9, 8)
    assert_exact(call)


@runs_kernel
def test_one_of_two_tokens_for_one_slot_is_stored():
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    caches = torch.zeros(2, 1, 2, 4, 8, device=DEVICE)
    kernel.kv_cache_update(x, x, *caches, torch.tensor([[2, 0, 2]], device=DEVICE))
    for h in range(2):
        assert any(torch.equal(caches[0, 0, h, 2], x[0, h, t]) for t in (0, 2))
        assert torch.equal(caches[0, 0, h, 0], x[0, h, 1]) and not caches[0, 0, h, [1, 3]].any()


@triton.jit
def _encode(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, kernel.to_e4m3(tl.load(x_ptr + offsets)))


@triton.jit
def _convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if x.dtype == tl.float32:
        tl.store(out_ptr + offsets, kernel.from_float32(x, out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + offsets, kernel.to_float32(x))


def every(dtype):
    """All numbers of a 16-bit dtype."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def wide(count=2**20):
    """fp32 numbers of any bits, and such as lie halfway between two of fewer bits."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0)).int()
    bits[::4] &= -(2**16)
    bits[1::4] = bits[1::4] & -(2**19) | 2**19
    return bits.view(torch.float32)


@runs_kernel
def test_e4m3_is_rounded_as_by_pytorch():
    """Every fp16 number and a million of fp32; what rounds to more than the largest is the largest."""
    small = wide().view(torch.int32) & (2**27 - 1 | -(2**31)) | 2**29 + 2**28 + 2**27  # of e4m3's magnitude
    x = torch.cat([every(torch.float16).float(), wide(), small.view(torch.float32)])
    x = x[~x.isnan()]
    x = torch.cat([x, x.new_zeros(-len(x) % 2**16)])
    out = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    _encode[(len(x) // 2**16,)](x.to(DEVICE), out, BLOCK=2**16)
    assert torch.equal(out.cpu(), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert ((x.abs() < 448) & (x.abs() > 2**-6)).sum() > 2**18


@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_conversions_are_those_of_pytorch(dtype):
    x = every(dtype)
    out = torch.empty(2**16, device=DEVICE)
    _convert[(1,)](x.to(DEVICE), out, BLOCK=2**16)
    assert torch.equal(out.cpu().nan_to_num(7.0, 8.0, 9.0), x.float().nan_to_num(7.0, 8.0, 9.0))
    x = torch.cat([wide(), x.float()])
    out = torch.empty(len(x), dtype=dtype, device=DEVICE)
    _convert[(len(x) // 2**16,)](x.to(DEVICE), out, BLOCK=2**16)
    out = out.cpu()
    known = ~x.isnan()
    assert torch.equal(out.isnan(), ~known) and torch.equal(out[known].view(torch.int16), x[known].to(dtype).view(torch.int16))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
@starts_the_interpreter
def test_under_the_interpreter(which):
    assert passed(__file__, which) >= len(SEEDS)
