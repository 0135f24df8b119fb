"""A launch that is planned once for all calls that are alike is that which each of them would be given alone."""

import gc
import os
import weakref
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

if "TRITON_INTERPRET" in os.environ:
    pytest.skip("the interpreter launches otherwise", allow_module_level=True)

from fake_gpu import launches  # noqa: E402

from fastgpt.kernels import attention_decode, attention_forward, kv_cache_update, launch, linear, linear_quantized, norm  # noqa: E402
from fastgpt.kernels.launch import Launch, Layout, plan  # noqa: E402


def tensor(*shape, strides=None, offset=0, dtype=torch.float16):
    """On a CPU, whose allocator aligns; offset: elements before it in its storage."""
    strides = strides or torch.empty(shape, device="meta").stride()
    last = sum((n - 1) * stride for n, stride in zip(shape, strides))
    return torch.empty(offset + last + 1, dtype=dtype).as_strided(shape, strides, offset)


def others(*shape):
    """Tensors that could be in place of a contiguous one: elsewhere in their storage, or with other strides."""
    *_, rows, columns = shape
    moved = tensor(*shape, offset=1), tensor(*shape, offset=4)
    return *moved, tensor(*shape[:-1], columns + 8)[..., :columns], tensor(*shape[:-2], columns, rows).mT


def int32(*shape):
    return tensor(*shape, dtype=torch.int32)


def of_attention(T):
    """(arguments, changes of them) of attention with T queries of 64 and 4 heads, which share 2 of keys."""
    q, kv = (2, 4, T, 64), (2, 2, 300, 64)
    base = {"q": tensor(*q), "k": tensor(*kv), "v": tensor(*kv), "causal": True, "scale": 0.125}
    changes = [{"q": x} for x in others(*q)] + [{name: x} for name in ("k", "v") for x in others(*kv)]
    changes += [{"q": tensor(2, T, 4, 64).transpose(1, 2)}, {"k": tensor(2, 300, 2, 64).transpose(1, 2)}]
    changes += [{"q": tensor(2, 8, T, 64)}, {"q": tensor(1, 4, T, 64), "k": tensor(1, *kv[1:]), "v": tensor(1, *kv[1:])}]
    changes += [{"k": tensor(2, 2, n, 64), "v": tensor(2, 2, n, 64)} for n in (299, 3000)]
    changes += [{"v": tensor(2, 2, 300, n)} for n in (32, 33, 34)]  # rows of 33 and 34 are copied into rows of 40
    changes += [{"q": tensor(2, 4, T, n), "k": tensor(2, 2, 300, n)} for n in (33, 34)]
    changes += [
        {"q": tensor(*q, dtype=x), "k": tensor(*kv, dtype=x), "v": tensor(*kv, dtype=x)}
        for x in (torch.bfloat16, torch.float32)
    ]
    changes += [{"causal": False}, {"scale": 0.25}, {"window": 7}, {"window": 9}, {"softcap": 2.0}, {"softcap": 3.0}]
    for dtype in torch.int8, torch.float8_e4m3fn:
        eight = {name: tensor(*kv, dtype=dtype) for name in ("k", "v")}
        eight |= {name: tensor(2, 2, 300, dtype=torch.float32) for name in ("k_scale", "v_scale")}
        changes += [eight, eight | {"v_scale": tensor(2, 2, 300, strides=(1200, 600, 2), dtype=torch.float32)}]
    changes += [{"kv_lengths": x} for x in (int32(2), int32(4)[::2])]
    changes += [{"alibi_slopes": tensor(n, dtype=torch.float32)[:: n // 4]} for n in (4, 8)]
    changes += [{"sinks": x} for x in (tensor(4), tensor(4, dtype=torch.float32), tensor(8)[::2])]
    for name, dtype in (("mask", torch.bool), ("bias", torch.float16), ("bias", torch.float32)):
        sizes = (300,), (T, 300), (1, 4, 1, 300), (2, 1, T, 1), (2, 4, T, 300)
        changes += [{name: tensor(*shape, dtype=dtype)} for shape in sizes]
        changes += [{name: tensor(2, 4, T, 304, dtype=dtype)[..., :300]}, {name: tensor(2, 4, 300, T, dtype=dtype).mT}]
        changes += [{name: tensor(2, 4, T, 304, dtype=dtype, offset=1)[..., :300]}]
    pools = {"k": tensor(40, 2, 16, 64), "v": tensor(40, 2, 16, 64)}
    changes += [pools | {"block_table": x} for x in (int32(2, 7), int32(2, 9), int32(2, 18)[:, ::2])]
    return base, changes


def forward():
    base, changes = of_attention(20)
    seed = {"dropout_seed": tensor(1, dtype=torch.int64)}
    changes += [seed | {"dropout_p": p} for p in (0.1, 0.2, 0.0)] + [{"scale": x} for x in (-0.125, 0.0)]
    packed = {name: tensor(1, heads, 600, 64) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    packed |= {"cu_seqlens_q": int32(4), "cu_seqlens_k": int32(4)}
    changes += [packed | {"max_seqlen_q": n} for n in (200, 400)] + [packed | {"max_seqlen_q": 200, "cu_seqlens_q": int32(6)}]
    changes += [packed | {"max_seqlen_q": 200, "cu_seqlens_k": int32(8)[::2]}]
    return attention_forward.attention_forward, base, changes


def decode():
    base, changes = of_attention(1)
    new = attention_decode.NewToken(
        tensor(2, 2, 1, 64),
        tensor(2, 2, 1, 64),
        int32(2, 1),
        int32(2, 1),
        *(tensor(400, 32, dtype=torch.float32) for _ in range(2)),
    )
    instead = {
        "k": [tensor(2, 1, 2, 96)[..., :64].transpose(1, 2), tensor(2, 2, 1, 64, offset=1)], "v": [tensor(2, 2, 1, 96)[..., :64]],
        "slots": [int32(2, 3)[:, :1], tensor(2, 1, dtype=torch.int64)], "positions": [int32(2, 3)[:, :1], int32(1, 1).expand(2, 1)],
        "cos": [tensor(400, 40, dtype=torch.float32)[:, :32], tensor(300, 32, dtype=torch.float32)],
        "sin": [tensor(400, 40, dtype=torch.float32)[:, :32]], "interleaved": [True],
    }  # fmt: skip
    changes += [{"new": new}] + [{"new": new._replace(**{name: x})} for name, given in instead.items() for x in given]
    changes += [{"new": new._replace(positions=None, cos=None, sin=None)}]
    changes += [{"counters": int32(n)} for n in (1, 4000)] + [{"new": new, "counters": int32(4000)}]
    return attention_decode.attention_decode, base, changes


def products(rows):
    base = {"x": tensor(rows, 128), "weight": tensor(48, 128)}
    vectors = {"bias": 48, "norm_weight": 128}
    changes = [{"x": x} for x in others(rows, 128)] + [{"weight": x} for x in others(48, 128)[:2]]
    changes += [{"x": tensor(1, rows, 128)}, {"x": tensor(rows, 3, 128)[:, 1]}, {"x": tensor(rows, 1, 1, 128)}]
    changes += [{"weight": tensor(n, 128)} for n in (47, 96)] + [{"x": tensor(2, 3, 136)[..., :128]}]
    changes += [{"x": tensor(3, 2, 128).transpose(0, 1)}, {"x": tensor(rows, 160), "weight": tensor(48, 160)}]
    changes += [{"x": tensor(rows, 128, dtype=x), "weight": tensor(48, 128, dtype=x)} for x in (torch.bfloat16, torch.float32)]
    changes += [{"residual": tensor(rows, 48)}, {"residual": tensor(rows, 56)[:, :48]}, {"residual": tensor(48, rows).T}]
    changes += [{"activation": 1}, {"gated": True}, {"gated": True, "bias": tensor(48)}]
    changes += [{name: tensor(n)} for name, n in vectors.items()] + [{name: tensor(2 * n)[::2]} for name, n in vectors.items()]
    normed = {"norm_weight": tensor(128)}
    changes += [{"norm_weight": tensor(128, offset=1)}, normed | {"norm_bias": tensor(128)}]
    changes += [normed | {"norm_bias": tensor(128, offset=1)}, normed | {"norm_bias": tensor(256)[::2]}]
    changes += [normed | x for x in ({"rms": True}, {"norm_eps": 1e-3}, {"norm_offset": 1.0})]
    return linear.linear, base, changes


def quantized(rows):
    blocks = lambda n, size, offset=0: tensor(n, size, dtype=torch.uint8, offset=offset)  # noqa: E731
    base = {"x": tensor(rows, 128), "blocks": blocks(48, 4 * 18), "bits": 4, "group_size": 32, "minima": False}
    _, of_linear, changes = products(rows)
    changes = [x for x in changes if "weight" not in x and x.get("x", of_linear["x"]).shape[-1] == 128]
    changes += [{"x": tensor(rows, 128, dtype=torch.bfloat16)}, {"blocks": blocks(96, 4 * 18)}]
    changes += [{"blocks": blocks(48, 4 * 18, n)} for n in (1, 2)] + [{"bits": 8, "blocks": blocks(48, 4 * 34)}, {"bits": 8}]
    changes += [{"minima": True, "blocks": blocks(48, 4 * 20, n)} for n in (0, 2)] + [{"group_size": 64}, {"minima": True}]
    changes += [{"residual": tensor(rows, 48, dtype=torch.float32)}]
    return linear_quantized.linear_quantized, base, changes


def updates():
    new, cache = (2, 3, 4, 64), (2, 3, 50, 64)
    vectors = {"positions": int32(2, 4), "cos": tensor(80, 32, dtype=torch.float32), "sin": tensor(80, 32, dtype=torch.float32)}
    base = {
        "q": tensor(2, 6, 4, 64),
        "k": tensor(*new),
        "v": tensor(*new),
        "k_cache": tensor(*cache),
        "v_cache": tensor(*cache),
    }
    base |= vectors
    changes = [{name: x} for name in ("k", "v") for x in others(*new)[:3]] + [{"q": x} for x in others(2, 6, 4, 64)[:3]]
    changes += [{name: x} for name in ("k_cache", "v_cache") for x in others(*cache)[:3]] + [{"interleaved": True}]
    changes += [{"k_cache": tensor(2, 3, 60, 64), "v_cache": tensor(2, 3, 60, 64)}, {"slots": int32(2, 4)}]
    changes += [{"slots": x} for x in (tensor(2, 4, dtype=torch.int64), int32(4, 2).T)] + [{"positions": int32(2, 5)[:, :4]}]
    changes += [{"cos": tensor(80, 36, dtype=torch.float32)[:, :32]}, {"sin": tensor(80, 33, dtype=torch.float32)[:, 1:]}]
    changes += [{name: tensor(90, 32, dtype=torch.float32) for name in ("cos", "sin")}]
    pools = {"k_cache": tensor(40, 3, 16, 64), "v_cache": tensor(40, 3, 16, 64)}
    changes += [pools | {"block_table": x} for x in (int32(2, 7), int32(2, 9), int32(2, 14)[:, ::2])]
    for dtype in torch.int8, torch.float8_e4m3fn:
        eight = {name: tensor(*cache, dtype=dtype) for name in ("k_cache", "v_cache")}
        changes += [eight | {name: tensor(2, 3, 50, dtype=torch.float32) for name in ("k_scale", "v_scale")}]
    return kv_cache_update.rope_kv_cache_update, base, changes


def norms():
    base = {"x": tensor(5, 128), "weight": tensor(128)}
    changes = [{"x": x} for x in others(5, 128)] + [{"x": tensor(3, 2, 128).transpose(0, 1)}, {"x": tensor(128)}]
    changes += [{"x": tensor(n, 128)} for n in (4, 200)] + [{"x": tensor(5, 64), "weight": tensor(64)}, {"x": tensor(0, 128)}]
    changes += [{"x": tensor(2, 3, 4, 5, 128).permute(3, 0, 2, 1, 4)}, {"x": tensor(1, 5, 128)}]
    changes += [{"x": tensor(5, 128, dtype=x), "weight": tensor(128, dtype=x)} for x in (torch.bfloat16, torch.float32)]
    changes += [{name: x} for name in ("weight", "bias") for x in (tensor(128), tensor(256)[::2], tensor(128, offset=1))]
    changes += [{"residual": x} for x in (tensor(5, 128), *others(5, 128))]
    return norm.norm, base, changes + [{"rms": True}, {"eps": 1e-3}, {"offset": 1.0}]


UNCACHED = launch.decided.__wrapped__
LAUNCHERS = {
    "forward": forward,
    "decode": decode,
    "linear": lambda: products(1),
    "linear, rows": lambda: products(6),
    "norm": norms,
    "quantized": lambda: quantized(1),
    "quantized, rows": lambda: quantized(6),
    "quantized, many rows": lambda: quantized(40),
    "update": updates,
}


def copied(x):
    """A tensor like x, at another address."""
    if isinstance(x, torch.Tensor):
        return tensor(*x.shape, strides=x.stride(), offset=x.storage_offset() % 16, dtype=x.dtype)
    return x._make(map(copied, x)) if isinstance(x, attention_decode.NewToken) else x


def seen(x, given):
    """What a compiled kernel gets of an argument; given: addresses of tensors that the launcher was called with."""
    if hasattr(x, "base"):
        return seen(x.base, given), x.shape, x.strides, x.block_shape, x.padding
    if isinstance(x, torch.Tensor):
        address = x.data_ptr() if x.data_ptr() in given else x.data_ptr() % 16
        return x.shape, x.stride(), torch.uint8 if x.dtype in Launch.BYTES else x.dtype, address
    return type(x), x


def launched(found, launcher, arguments):
    """What a call launches, and the form of its results."""
    del found[:]
    results = launcher(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    values = [*arguments.values(), *(arguments.get("new") or ())]
    given = {x.data_ptr() for x in values if isinstance(x, torch.Tensor)}
    arguments = [{name: seen(x, given) for name, x in launch.arguments.items()} for launch in found]
    made = [(x.shape, x.stride(), x.dtype) for x in results]
    return [(x.kernel, x.variant, x.grid) for x in found], arguments, made


def misled(launcher, base, changes):
    """Whether a call, after others, launches another thing than it does alone."""
    with launches() as found:
        for change in changes:
            arguments = base | change
            with mock.patch.object(launch, "decided", UNCACHED):
                expected = launched(found, launcher, arguments)
            try:
                launcher(**base)
                for _ in range(2):
                    launcher(**{name: copied(x) for name, x in arguments.items()})
                if launched(found, launcher, arguments) != expected:
                    return True
            except Exception:  # of a decision for other tensors
                return True
    return False


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_call_launches_what_it_launches_alone(name):
    assert not misled(*LAUNCHERS[name]())


def coarse(without_field=None, without_number=None):
    """`decided`, keeping decisions for calls that differ in a field of their layouts, or in a number."""
    kept = {}

    def decided(decide, device, layouts, *numbers):
        fields = (() if x is None else x[:without_field] + x[without_field + 1 :] for x in layouts)
        number = len(numbers) if without_number is None else without_number
        key = decide, tuple(layouts if without_field is None else fields), numbers[:number] + numbers[number + 1 :]
        if key not in kept:
            kept[key] = UNCACHED(decide, device, layouts, *numbers)
        return kept[key]

    return decided


FIELDS = Layout._fields[:4]
NUMBERS = {
    "forward": 8,
    "decode": 7,
    "linear": 5,
    "linear, rows": 5,
    "norm": 3,
    "quantized": 8,
    "quantized, rows": 8,
    "update": 1,
}
FAULTS = [({"without_field": i}, field) for i, field in enumerate(FIELDS)]
FAULTS += [({"without_number": i}, f"number {i}") for i in range(8)]


@pytest.mark.parametrize("fault, name", [
    pytest.param(fault, name, id=f"{name}: {field}") for fault, field in FAULTS for name, count in NUMBERS.items()
    if fault.get("without_number", 0) < count
])  # fmt: skip
def test_a_key_that_lacks_something_is_found(fault, name, monkeypatch):
    """The fault that the test above is for, planted."""
    monkeypatch.setattr(launch, "decided", coarse(**fault))
    assert misled(*LAUNCHERS[name]())


def test_other_devices_have_their_own_plans(monkeypatch):
    x = mock.Mock(**{"stride.return_value": (1,), "data_ptr.return_value": 0}, shape=(4,), dtype=torch.float16)
    for device in "cuda:0", "cuda:1", "cuda:0":
        x.device = torch.device(device)
        assert plan(lambda layouts: layouts[0].device, (x,)) == x.device


def test_a_plan_keeps_no_tensor():
    x, weight = tensor(5, 128), tensor(128)
    with launches() as found:
        for _ in range(3):
            norm.norm(x, weight)
        del found[:]
    at = weakref.ref(x)
    del x
    gc.collect()
    assert at() is None


def test_plans_are_bounded():
    assert launch.decided.cache_info().maxsize


@pytest.mark.parametrize("strides", [(4096, 256, 1), (4, 2, 1), (0, 0, 0), (1, 2, 4), (0, 1, 3)])
@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 1, 3), (2, 0, 3), (2, 2, 2), (1, 1, 1)])
def test_layouts_are_those_of_tensors(shape, strides):
    x = torch.empty_strided(shape, strides, device="meta")
    layout = Layout(x.shape, x.stride(), x.dtype, 0, x.device)
    assert layout.is_contiguous() == x.is_contiguous()
    assert (layout.dim(), layout.numel(), layout.element_size()) == (x.dim(), x.numel(), x.element_size())
    if 0 not in shape:
        wide = tuple(n if n > 1 else 3 for n in shape)
        a, b = layout.expand(5, *wide), x.expand(5, *wide)
        assert (a.shape, a.stride(), a.stride(-1)) == (b.shape, b.stride(), b.stride(-1))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 0, 4), (1, 5)])
def test_dense_is_contiguous(shape):
    assert launch.dense(*shape) == (shape, torch.empty(shape, device="meta").stride())
