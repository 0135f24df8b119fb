"""The attention and mask functions for transformers, against those of its own for PyTorch's attention."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from transformers import DynamicCache, MistralConfig, StaticCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import fastgpt.integrations.transformers as ft
from fastgpt.integrations.transformers.masks import Mask
from fastgpt.testing.numerics import check

REGISTERED_BY_IMPORT = "fastgpt" in AttentionInterface._global_mapping
WINDOW = 5
CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(autouse=True)
def registered():
    ft.register()
    yield
    ft.unregister()


def layer(is_causal=True, groups=2):
    return SimpleNamespace(is_causal=is_causal, num_key_value_groups=groups, layer_idx=0, training=False)


def inputs(B=3, H=4, H_kv=2, T=7, S=7, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def theirs(module, q, k, v, mask, dtype, **options):
    """PyTorch's attention as transformers calls it, in a dtype."""
    q, k, v, mask, *rest = (
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in (q, k, v, mask, *options.values())
    )
    return sdpa_attention_forward(module, q, k, v, mask, **dict(zip(options, rest)))[0]


def check_against_theirs(module, q, k, v, ours, mask, *, rows=None, **options):
    """With our mask our attention does what theirs does with theirs, for the queries of `rows` (B, T)."""
    actual, weights = ft.attention(module, q, k, v, ours, **options)
    assert weights is None and actual.is_contiguous()
    results = [actual, *(theirs(module, q, k, v, mask, dtype, **options) for dtype in (torch.float64, q.dtype))]
    check(*(x if rows is None else x[rows] for x in results), dtype=q.dtype)


# Masks


def made(kind: str, config, T: int, *, padding=None, **arguments):
    """The masks of a pass, for batches of three, that transformers gets for fastgpt and for PyTorch's attention."""
    masks = []
    for name in ("fastgpt", "sdpa"):
        config._attn_implementation = name
        create = getattr(masking_utils, f"create_{kind}")
        masks.append(create(config=config, inputs_embeds=torch.empty(3, T, 32), attention_mask=padding, **arguments))
    return masks


def padding_of(side: str | None, total: int, hidden=(0, 2, 4)):
    if side is None:
        return None
    real = torch.ones(3, total, dtype=torch.long)
    for row, n in zip(real, (0, 0, 0) if side == "nowhere" else hidden):
        row[:n] = 0
    return real.flip(1) if side == "right" else real


def is_mask(actual, expected):
    """To whom it is only a tensor, it is the boolean mask."""
    assert torch.equal(actual & True, expected)
    assert torch.equal(actual[:, :, :, : expected.shape[3]] & True, expected)
    assert torch.equal(actual[:, :, 1:, :2], expected[:, :, 1:, :2])
    assert torch.equal(actual.flatten(1), expected.flatten(1)) and actual.dtype == torch.bool


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
    "ours": lambda config: ft.Cache(config),
}
PASSES = [(0, 7), (0, 1), (3, 1), (3, 6), (9, 1), (9, 4)]  # tokens in the cache, new ones


@pytest.mark.parametrize("side", [None, "nowhere", "left", "right"])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    "cache, past, T", [(None, 0, 7), (None, 0, 1), *((cache, past, T) for cache in CACHES for past, T in PASSES)]
)
@torch.no_grad()
def test_causal_masks(cache, past, T, window, side):
    config = MistralConfig(**CONFIG, sliding_window=window)
    held = CACHES[cache](config) if cache else None
    q, k, v = inputs(T=T, S=past + T)
    if past:
        held.update(k[:, :, :past], v[:, :, :past], 0)
    padding = padding_of(side, past + T)
    kind = "causal_mask" if window is None else "sliding_window_causal_mask"
    ours, mask = made(kind, config, T, cache=held, padding=padding)
    k, v = held.update(k[:, :, past:], v[:, :, past:], 0) if cache else (k, v)
    check_against_theirs(layer(), q, k, v, ours, mask, rows=None if padding is None else padding[:, past:].bool())
    if isinstance(ours, Mask) and mask is not None:
        is_mask(ours, mask)


def test_common_masks_are_not_materialized():
    """No booleans for every query and key in the common cases."""
    full, sliding = MistralConfig(**CONFIG), MistralConfig(**CONFIG, sliding_window=WINDOW)
    with mock.patch.object(masking_utils, "sdpa_mask", side_effect=AssertionError):
        for side in (None, "nowhere", "left", "right"):
            arguments = {"config": full, "inputs_embeds": torch.empty(3, 7, 32), "attention_mask": padding_of(side, 7)}
            full._attn_implementation = sliding._attn_implementation = "fastgpt"
            masking_utils.create_causal_mask(**arguments, cache=None)
            masking_utils.create_sliding_window_causal_mask(**arguments | {"config": sliding}, cache=None)
            masking_utils.create_bidirectional_mask(**arguments)


EDITS = {
    "setitem": lambda mask: mask.__setitem__((slice(None), slice(None), slice(3, None), 2), False),
    "one query": lambda mask: mask.__setitem__((0, 0, 3, 2), False),
    "logical_and_": lambda mask: mask.logical_and_(torch.arange(7) != 2),
    "masked_fill_": lambda mask: mask.masked_fill_(torch.arange(7) == 2, False),
    "augmented": lambda mask: mask.__iand__(torch.arange(7) != 2),
    "slice": lambda mask: mask[:, :, :, :7][:, :, 3:, 2].fill_(False),
    "view": lambda mask: mask.view(-1)[::3].fill_(False),
    "after a look": lambda mask: (mask.any(), mask[1, 0, 4:].fill_(False)),
    "detach": lambda mask: mask.detach()[:, :, 3:, 2].zero_(),
    "data": lambda mask: mask.data[:, :, 3:, 2].zero_(),
    "numpy": lambda mask: mask.numpy().__setitem__((slice(None), slice(None), 3, 2), False),
    "out": lambda mask: torch.logical_and(mask, torch.arange(7) != 2, out=mask),
    "copy_": lambda mask: mask.copy_(mask & (torch.arange(7) != 2)),
    "iteration": lambda mask: [row[:, 3:, 2].zero_() for row in mask],
    "operator": lambda mask: torch.ops.aten.logical_and_.default(mask, torch.arange(7) != 2),
}


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("kind", ["causal_mask", "sliding_window_causal_mask", "bidirectional_mask"])
def test_an_edited_mask_counts_as_edited(kind, edit, guard):
    config = MistralConfig(**CONFIG, sliding_window=WINDOW)
    with guard():
        cache = {} if kind == "bidirectional_mask" else {"cache": None}
        ours, mask = made(kind, config, 7, padding=padding_of("left", 7), **cache)
        assert type(ours) is Mask
        for x in ours, mask:
            edit(x)
        q, k, v = inputs()
        plain = ours.clone()
        assert type(plain) is torch.Tensor and torch.equal(plain, mask)
        assert torch.equal(*(ft.attention(layer(), q, k, v, x)[0] for x in (ours, plain)))


def through_a_file(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "take",
    [
        copy.deepcopy, copy.copy, torch.clone, through_a_file, lambda mask: pickle.loads(pickle.dumps(mask)),
        lambda mask: torch.tensor(mask.tolist()), lambda mask: torch.from_numpy(mask.numpy()), lambda mask: torch.stack(list(mask)),
        lambda mask: mask.to("cpu", torch.float32).bool(), lambda mask: torch.where(mask, 0.0, -torch.inf) == 0,
        lambda mask: torch.compile(lambda x: x & True, backend="eager")(mask), lambda mask: torch.func.vmap(lambda x: x & True)(mask),
        lambda mask: eval(repr(mask), {"tensor": torch.tensor}),
    ],
)  # fmt: skip
def test_a_mask_is_a_tensor(take):
    ours, mask = made("causal_mask", MistralConfig(**CONFIG), 7, padding=padding_of("left", 7), cache=None)
    assert type(ours) is Mask and torch.equal(take(ours), mask)


def test_looking_at_sizes_and_slicing_nothing_off_makes_no_mask():
    ours, _ = made("causal_mask", MistralConfig(**CONFIG), 7, padding=padding_of("left", 7), cache=None)
    assert ours.shape == (3, 1, 7, 7) and ours.dtype == torch.bool and ours.device.type == "cpu" and ours.dim() == 4
    assert ours.size(-1) == 7 and ours.stride() == (49, 49, 7, 1) and ours.numel() == 147 and len(ours) == 3
    assert ours[:, :, :, :7] is ours and ours.to("cpu") is ours and ours.contiguous() is ours and ours.untouched


def test_the_padding_of_a_mask_is_its_own():
    """Neither does a later edit of the caller's padding change a mask, nor an edit of a mask the caller's padding."""
    padding = padding_of("left", 7).bool()
    for T, past in ((7, 0), (1, 6)):
        cache = DynamicCache()
        cache.update(*(torch.zeros(3, 2, past, 8) for _ in range(2)), 0)
        given = padding.clone()
        ours, mask = made("causal_mask", MistralConfig(**CONFIG), T, padding=given, cache=cache)
        given.fill_(True)
        assert torch.equal(ours.clone(), mask)
        given = padding.clone()
        made("causal_mask", MistralConfig(**CONFIG), T, padding=given, cache=cache)[0].fill_(True)
        assert torch.equal(given, padding)


@pytest.mark.parametrize("T, S", [(7, 7), (1, 9), (4, 9)])
@pytest.mark.parametrize("side", [None, "nowhere", "left", "right"])
def test_bidirectional_masks(T, S, side):
    """Of encoders, and of attention to an encoder's tokens."""
    padding = padding_of(side, S)
    ours, mask = made(
        "bidirectional_mask", MistralConfig(**CONFIG), T, padding=padding, encoder_hidden_states=torch.empty(3, S, 32)
    )
    check_against_theirs(layer(is_causal=False), *inputs(T=T, S=S), ours, mask)
    assert (ours is None) == (mask is None) and (mask is None or torch.equal(ours, mask))


def test_bidirectional_window():
    config = MistralConfig(**CONFIG, sliding_window=2)
    ours, mask = made("bidirectional_sliding_window_mask", config, 9)
    assert torch.equal(ours, mask)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("by", ["positions", "bounds"])
def test_packed_sequences(by, window):
    """Sequences in a row do not see each other, whether positions tell them apart or where they begin."""
    lengths = [[3, 4, 2], [9], [1, 8]] if by == "positions" else [[3, 4, 2] * 3]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    B, T = positions.shape
    kind, config = (
        "causal_mask" if window is None else "sliding_window_causal_mask",
        MistralConfig(**CONFIG, sliding_window=window),
    )
    create = getattr(masking_utils, f"create_{kind}")
    arguments = {"inputs_embeds": torch.empty(B, T, 32), "attention_mask": None, "cache": None}
    config._attn_implementation = "sdpa"
    mask = create(config=config, position_ids=positions, **arguments)
    config._attn_implementation = "fastgpt"
    ours = create(config=config, position_ids=positions if by == "positions" else None, **arguments)
    more = {}
    if by == "bounds":
        bounds = torch.tensor([0, *lengths[0]]).cumsum(0)
        more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
    with ft.record() as calls:
        check_against_theirs(layer(), *inputs(B=B, T=T, S=T), ours, mask, **more)
    assert calls == {"cpp": 1}
    if by == "positions":
        is_mask(ours, mask)


def test_unknown_mask_functions_are_theirs():
    """Another mask than those we know, and a part of it that we do."""
    ids = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1, -1]]).expand(3, -1)
    config = MistralConfig(**CONFIG, attention_chunk_size=4)
    for kind, options in (
        ("causal_mask", {"block_sequence_ids": ids}),
        ("causal_mask", {"or_mask_function": lambda b, h, q, k: (q < 3) & (k < 3)}),
        ("causal_mask", {"and_mask_function": lambda b, h, q, k: q % 2 == k % 2}),
        ("chunked_causal_mask", {}),
    ):
        ours, mask = made(kind, config, 9, padding=padding_of("left", 9), cache=None, **options)
        assert type(ours) is torch.Tensor and torch.equal(ours, mask)


def test_lazy_masks_keep_the_state_they_were_made_with():
    """It is made, if at all, when a layer asks: a static cache has counted on by then."""
    config = MistralConfig(**CONFIG, sliding_window=None)
    cache = CACHES["static"](config)
    q, k, v = inputs(T=6, S=9)
    cache.update(k[:, :, :3], v[:, :, :3], 0)
    ours, mask = made("causal_mask", config, 6, cache=cache, padding=padding_of("left", 9))
    cache.update(k[:, :, 3:], v[:, :, 3:], 0)
    is_mask(ours, mask)


def test_mask_is_a_tensor():
    ours, mask = made("causal_mask", MistralConfig(**CONFIG, sliding_window=None), 7, padding=padding_of("left", 7), cache=None)
    assert isinstance(ours, Mask) and ours.shape == mask.shape and ours.dtype == mask.dtype and ours.device == mask.device
    q, k, v = inputs(H_kv=4)
    F = torch.nn.functional
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=ours), expected)
    assert torch.equal(torch.where(ours, 0.0, -1.0), torch.where(mask, 0.0, -1.0))
    for operation in (torch.clone, torch.Tensor.detach, torch.Tensor.contiguous, torch.logical_not, torch.Tensor.float):
        assert torch.equal(operation(ours) + 0, operation(mask) + 0)
    assert "True" in repr(ours)


# Attention


FEATURES = {
    "nothing": {},
    "scale": {"scaling": 0.3},
    "boolean mask": {"mask": lambda B, H, T, S: torch.rand(B, 1, T, S) > 0.3},
    "boolean mask of heads": {"mask": lambda B, H, T, S: torch.rand(B, H, T, S) > 0.3},
    "additive mask": {"mask": lambda B, H, T, S: torch.where(torch.rand(1, 1, T, S) > 0.3, 0.0, torch.finfo(torch.float32).min)},
    "mask of infinities": {"mask": lambda B, H, T, S: torch.where(torch.rand(1, 1, T, S) > 0.3, 0.0, -torch.inf)},
    "position bias": {"position_bias": lambda B, H, T, S: torch.randn(1, H, T, S)},
    "position bias and mask": {
        "position_bias": lambda B, H, T, S: torch.randn(1, H, T, S), "mask": lambda B, H, T, S: torch.rand(B, 1, T, S) > 0.3,
    },
    "position bias and additive mask": {
        "position_bias": lambda B, H, T, S: torch.randn(1, H, T, S), "mask": lambda B, H, T, S: torch.randn(B, 1, T, S),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S", [(7, 7), (1, 9), (4, 9), (9, 4)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature", FEATURES)
def test_attention(feature, causal, T, S, dtype):
    """With T != S, no mask and a causal layer, query i sees the keys up to i."""
    torch.manual_seed(0)
    options = {name: make(3, 4, T, S) if callable(make) else make for name, make in FEATURES[feature].items()}
    options = {name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()}
    mask = options.pop("mask", None)
    if mask is not None:
        mask[..., 0] = True if mask.dtype == torch.bool else 0.0  # no row without a key
    with ft.record() as calls:
        check_against_theirs(layer(causal), *inputs(T=T, S=S, dtype=dtype), mask, mask, **options)
        check_against_theirs(layer(not causal), *inputs(T=T, S=S, dtype=dtype), mask, mask, is_causal=causal, **options)
    assert calls == {"cpp": 2}


def test_gradients():
    """By queries, keys, values and position bias."""
    tensors = [*inputs(), torch.randn(1, 4, 7, 7)]
    dout = torch.randn(3, 7, 4, 8)

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(layer(), *leaves[:3], None, position_bias=leaves[3])[0]
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    check(gradients(ft.attention, torch.float32), lambda: gradients(sdpa_attention_forward, torch.float64))


def eager(name: str):
    """The attention that a model has where none is chosen, which knows what PyTorch's does not."""
    return getattr(transformers.models, name).__getattr__(f"modeling_{name}").eager_attention_forward


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("D", [8, 584])  # the latter is more than the kernels take
@pytest.mark.parametrize(
    "model, options", [("gemma2", {"softcap": 2.0}), ("gpt_oss", {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])})]
)
def test_softcap_and_sinks(model, options, D, asked):
    """With all weights if asked for."""
    q, k, v = inputs(D=D)
    module = layer()
    module.sinks, module.head_dim = options.get("s_aux"), D
    mask = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 0] = True
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    function = eager(model)
    with ft.record() as calls:
        actual = ft.attention(module, q, k, v, mask, scaling=0.5, output_attentions=asked, **options)
    assert (calls == {"cpp": 1}) == (D == 8 and not asked)
    with mock.patch.object(torch, "float32", torch.float64):
        module.sinks = module.sinks.double() if module.sinks is not None else None
        oracle = function(module, q.double(), k.double(), v.double(), additive.double(), scaling=0.5, dropout=0.0, **options)
    module.sinks = options.get("s_aux")
    low = function(module, q, k, v, additive, scaling=0.5, dropout=0.0, **options)
    for ours, *theirs in list(zip(actual, oracle, low))[: 1 + asked]:
        check(ours, *theirs, dtype=torch.float32)
    assert asked or actual[1] is None


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_weights(window, side):
    """Of a model's own mask, and what they weigh: for real queries, those of a softmax over what they see."""
    config, padding = MistralConfig(**CONFIG, sliding_window=window), padding_of(side, 7)
    kind = "causal_mask" if window is None else "sliding_window_causal_mask"
    ours, mask = made(kind, config, 7, padding=padding, cache=None)
    q, k, v = inputs()
    out, weights = ft.attention(layer(), q, k, v, ours, output_attentions=True)
    without = ft.attention(layer(), q, k, v, ours)[0]
    real = torch.ones(3, 7, dtype=torch.bool) if padding is None else padding.bool()
    assert weights.shape == (3, 4, 7, 7)

    def of_real_queries(x):
        return x.transpose(1, 2)[real]

    def expected():
        q64, k64, v64 = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
        seen = torch.ones(7, 7, dtype=torch.bool).tril() if mask is None else mask
        weights = (q64 @ k64.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        return of_real_queries(weights @ v64), of_real_queries(weights @ v64), of_real_queries(weights)

    check((out[real], without[real], of_real_queries(weights)), expected)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"D": 584}, "head dims 584"),
        ({"B": 1}, "1 x 4 heads of queries, 3 x 4 of keys"),
        ({"v": 584}, "head dims 8, 8, 584"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_unsupported_calls_are_served_with_a_reason(change, reason):
    q, k, v = inputs(H_kv=4, D=change.get("D", 8))
    q = q[: change.get("B", 3)]
    v = torch.randn(3, 4, 7, change["v"]) if "v" in change else v
    mask = torch.rand(3, 1, 7, 7) > 0.3
    for attention_mask in (None, mask):
        dropout = change.get("dropout", 0.0)
        with ft.record() as calls:
            actual = ft.attention(layer(groups=1), q, k, v, attention_mask, dropout=dropout)[0]
        assert torch.equal(actual, sdpa_attention_forward(layer(groups=1), q, k, v, attention_mask, dropout=dropout)[0])
        assert len(calls) == 1 and f"sdpa: {reason}" in next(iter(calls))


def test_transforms_of_torch_func_and_jit():
    """torch.func and torch.jit, which know nothing of our operation."""
    q, k, v = inputs(H_kv=4)

    def call(q):
        return ft.attention(layer(groups=1), q, k, v, None)[0]

    expected = call(q)
    torch.testing.assert_close(torch.func.vmap(call, randomness="same")(torch.stack([q, q]))[1], expected)
    torch.testing.assert_close(
        torch.func.grad(lambda q: call(q).sum())(q), torch.autograd.grad(call(q.requires_grad_()).sum(), q)[0]
    )
    with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
        torch.testing.assert_close(torch.jit.trace(call, q.detach())(q.detach()), expected)


def test_other_layouts_and_dtypes():
    q, k, v = inputs(dtype=torch.float64)
    expected = sdpa_attention_forward(layer(), q, k, v, None)[0]
    out = ft.attention(layer(), q, k, v, None)[0]
    assert out.dtype == torch.float64
    # Neither is an oracle for the other. A score q·k / sqrt(8) of 8 terms errs by 10 eps |q||k| / sqrt(8) at most, and a
    # weight by twice that, relatively, and the softmax's own 10 eps; of 7 weighted values the sum errs by 7 eps |v|.
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max() / 8**0.5).item()
    bound = (2 * 10 * largest + 10 + 7) * torch.finfo(torch.float64).eps * v.abs().max().item()
    assert (out - expected).abs().max() <= 2 * bound
    strided = [x.float().transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert all(x.stride(3) != 1 for x in strided)
    exact = [x.double() for x in strided]
    check(ft.attention(layer(), *strided, None)[0], lambda: sdpa_attention_forward(layer(), *exact, None)[0])


def test_autocast():
    """Keys that rotary embedding left in float32, and values in bfloat16, as PyTorch's own function takes them."""
    q, k, v = inputs(H_kv=4)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ft.attention(layer(groups=1), q, k, v.bfloat16(), None)[0]
        expected = sdpa_attention_forward(layer(groups=1), q, k, v.bfloat16(), None)[0]
    assert actual.dtype == expected.dtype == torch.bfloat16
    oracle = sdpa_attention_forward(layer(groups=1), *(x.bfloat16().double() for x in (q, k, v)), None)[0]
    check(actual, oracle, expected, dtype=torch.bfloat16)


def test_dropout():
    """In training weights are dropped, the same ones for the same seed, and outputs keep their mean."""
    q, k, _ = inputs(T=40, S=40, H_kv=4)
    v = torch.ones(3, 4, 40, 8)

    def call(dropout):
        torch.manual_seed(5)
        return ft.attention(layer(), q, k, v, None, dropout=dropout)[0]

    assert torch.equal(call(0.5), call(0.5)) and not torch.equal(call(0.5), call(0.0))
    assert abs(call(0.5).mean() - 1) < 0.1


# Registering


def served_by_us() -> bool:
    return (
        AttentionInterface._global_mapping.get("fastgpt") is ft.attention
        and AttentionMaskInterface._global_mapping.get("fastgpt") is ft.mask
    )


def test_registering():
    assert not REGISTERED_BY_IMPORT
    ft.register()
    assert served_by_us()
    ft.unregister()
    assert not served_by_us() and "fastgpt" not in AttentionInterface._global_mapping
    ft.unregister()
    AttentionInterface.register("fastgpt", sdpa_attention_forward)
    ft.register()
    ft.register()
    assert served_by_us()
    ft.unregister()
    assert AttentionInterface._global_mapping.pop("fastgpt") is sdpa_attention_forward


def test_registering_as_another():
    """Under the name of PyTorch's attention it serves what is there already."""
    before = AttentionInterface._global_mapping["sdpa"], AttentionMaskInterface._global_mapping["sdpa"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, vocab_size=50, intermediate_size=16)).eval()
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        expected = model(ids).logits
        ft.register("sdpa")
        with ft.record() as calls:
            torch.testing.assert_close(model(ids).logits, expected)
        ft.unregister("sdpa")
        assert calls == {"cpp": 2} and served_by_us()
        with ft.record() as calls:
            model(ids)
    assert not calls
    assert before == (AttentionInterface._global_mapping["sdpa"], AttentionMaskInterface._global_mapping["sdpa"])


def test_registering_in_threads():
    barrier, errors = threading.Barrier(4), []

    def work():
        barrier.wait()
        try:
            for _ in range(200):
                ft.register()
                ft.unregister()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not served_by_us() and "fastgpt" not in AttentionInterface._global_mapping


def test_models_with_attention_of_their_own():
    """They keep it, and the mask that it expects; and it is said that fastgpt does not serve them."""
    config = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ids, padding = torch.randint(50, (3, 7)), padding_of("left", 7)
    logits = []
    for name in ("eager", "fastgpt"):
        torch.manual_seed(0)
        model = transformers.BloomForCausalLM._from_config(transformers.BloomConfig(**config), attn_implementation=name).eval()
        with ft.record() as calls:
            if name == "fastgpt":
                with pytest.warns(UserWarning, match="bloom: its attention does not go through"):
                    logits.append(model(ids, attention_mask=padding).logits)
            else:
                logits.append(model(ids, attention_mask=padding).logits)
        assert not calls
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("installed", [None, "4.40.0"])
def test_without_transformers_5(installed, tmp_path):
    if installed:
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = {installed!r}")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    program += "" if installed else "sys.modules['transformers'] = None\n"
    program += "try:\n    import fastgpt.integrations.transformers\nexcept ImportError as error:\n    print(error)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = 'needs transformers 5, which is not installed: pip install "transformers>=5"'
    assert result.stdout == f"fastgpt.integrations.transformers {expected}\n", result.stderr
