"""What a registered operation hands to a Triton kernel, which looks at nothing: checked where it is launched, without a GPU."""

import contextlib

import pytest
import torch

import fastgpt
from fastgpt.ops import attention, decode_step, kv_cache_update, linear, moe, norm, route
from fastgpt.ops import attention_with_kv_cache as cached
from fastgpt.ops.attention.operators import attention_backward_triton, attention_forward_triton


def cache(dtype=torch.int8):
    new, stored = torch.ones(2, 1, 2, 3, 8), torch.ones(2, 1, 2, 4, 8, dtype=dtype)
    positions = torch.ones(1, 3, dtype=torch.int32)
    return {"k": new[0], "v": new[1], "k_cache": stored[0], "v_cache": stored[1], "positions": positions}


LAUNCHERS = {
    "norm": (norm._norm_triton, "fastgpt.kernels.norm.norm", lambda: {"x": torch.ones(2, 8), "weight": torch.ones(8)}),
    "linear": (linear._linear_triton, "fastgpt.kernels.linear.linear", lambda: {
        "x": torch.ones(2, 8), "weight": torch.ones(4, 8), "bias": torch.ones(4), "residual": torch.ones(2, 4),
        "norm_weight": torch.ones(8),
    }),
    "linear_quantized": (
        lambda **call: linear._linear_quantized_triton(bits=8, group_size=32, minima=False, block_type=0, **call),
        "fastgpt.kernels.linear_quantized.linear_quantized",
        lambda: {
            "x": torch.ones(2, 32), "blocks": torch.ones(4, 34, dtype=torch.uint8), "bias": torch.ones(4),
            "residual": torch.ones(2, 4), "norm_weight": torch.ones(32),
        },
    ),
    "route": (
        lambda **call: route._route_triton(top_k=2, **call), "fastgpt.kernels.moe.route",
        lambda: {"logits": torch.ones(2, 4), "selection_bias": torch.ones(4)},
    ),
    "moe": (moe._moe_triton, "fastgpt.kernels.moe.moe", lambda: {
        "x": torch.ones(2, 8), "experts": torch.ones(2, 2, dtype=torch.int32), "weights": torch.ones(2, 2),
        "up": torch.ones(4, 6, 8), "down": torch.ones(4, 8, 3), "up_bias": torch.ones(4, 6), "down_bias": torch.ones(4, 8),
        "residual": torch.ones(2, 8),
    }),
    "moe_quantized": (
        lambda **call: moe._moe_quantized_triton(
            up_bits=8, up_group_size=32, up_minima=False, up_block_type=0, down_bits=4, down_group_size=32, down_minima=True,
            down_block_type=0, num_experts=4, **call,
        ),
        "fastgpt.kernels.moe_quantized.moe_quantized",
        lambda: {
            "x": torch.ones(2, 64), "experts": torch.ones(2, 2, dtype=torch.int32), "weights": torch.ones(2, 2),
            "up_blocks": torch.ones(4 * 64, 68, dtype=torch.uint8), "down_blocks": torch.ones(4 * 64, 20, dtype=torch.uint8),
            "up_bias": torch.ones(4, 64), "down_bias": torch.ones(4, 64), "residual": torch.ones(2, 64),
        },
    ),
    "embed": (decode_step._embed_triton, "fastgpt.kernels.decode_step.embed", lambda: {
        "ids": torch.ones(2, 1, dtype=torch.int64), "weight": torch.ones(4, 8),
        "positions": torch.ones(2, 1, dtype=torch.int32), "position_weight": torch.ones(4, 8),
    }),
    "advance_": (decode_step._advance_triton, "fastgpt.kernels.decode_step.advance", lambda: {
        "lengths": torch.ones(2, dtype=torch.int32), "positions": torch.ones(2, 1, dtype=torch.int32),
    }),
    "record_token_": (decode_step._record_token_triton, "fastgpt.kernels.decode_step.record_token", lambda: {
        "token": torch.ones(2, dtype=torch.int64), "scores": torch.ones(2, 1), "tokens": torch.ones(3, 2, dtype=torch.int64),
        "extreme": torch.ones(2, 1), "step": torch.zeros(1, dtype=torch.int64), "ended": torch.zeros(2, dtype=torch.bool),
        "eos": torch.ones(1, dtype=torch.int64),
    }),
    "kv_cache_update": (
        kv_cache_update.operators.kv_cache_update_triton, "fastgpt.kernels.kv_cache_update.kv_cache_update",
        lambda: {**cache(), **{name: torch.ones(1, 2, 4) for name in ("k_scale", "v_scale")}},
    ),
    "rope_kv_cache_update": (
        kv_cache_update.operators.rope_kv_cache_update_triton, "fastgpt.kernels.kv_cache_update.rope_kv_cache_update",
        lambda: {
            "q": torch.ones(1, 4, 3, 8), **cache(torch.float32), "slots": torch.ones(1, 3, dtype=torch.int64),
            "cos": torch.ones(9, 4), "sin": torch.ones(9, 4), "block_table": torch.zeros(1, 1, dtype=torch.int32),
        },
    ),
    "attention_forward": (
        lambda *, causal=True, **call: attention_forward_triton(*attention.Call(causal=causal, scale=1.0, **call)),
        "fastgpt.kernels.attention_decode.attention_decode",
        lambda: {
            "q": torch.ones(1, 2, 1, 8), "k": torch.ones(1, 2, 4, 8), "v": torch.ones(1, 2, 4, 8),
            "kv_lengths": torch.ones(1, dtype=torch.int32), "sinks": torch.ones(2),
        },
    ),
    "attention_backward": (
        lambda *, dout, out, lse, **call: attention_backward_triton(
            dout, None, out, lse, False, *call.values(), True, 1.0
        ),
        "fastgpt.kernels.attention_backward.attention_backward",
        lambda: {"dout": torch.ones(1, 2, 3, 8), "out": torch.ones(1, 2, 3, 8), "lse": torch.ones(1, 2, 3)} | {
            name: torch.ones(1, 2, 3, 8) for name in "qkv"
        },
    ),
    "attention_with_kv_cache": (
        lambda **call: cached._attention_with_kv_cache_triton(counters=None, causal=True, scale=1.0, **call),
        "fastgpt.kernels.attention_decode.attention_decode",
        lambda: {
            "q": torch.ones(1, 2, 1, 8), "k": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 8),
            "k_cache": torch.ones(1, 2, 4, 8), "v_cache": torch.ones(1, 2, 4, 8), "slots": torch.ones(1, 1, dtype=torch.int32),
            "kv_lengths": torch.ones(1, dtype=torch.int32),
        },
    ),
}  # fmt: skip
FAULTS = {
    "shape": lambda x: torch.cat([x, x]),
    "dimensions": lambda x: x.unsqueeze(0),
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
}
ANY_ROWS = {
    ("norm", "x"),
    ("route", "logits"),
    ("embed", "weight"),
    ("embed", "position_weight"),
    ("record_token_", "eos"),
    ("record_token_", "tokens"),
}
ANY_DIMENSIONS = {("x", "dimensions", "norm"), ("logits", "dimensions", "route")}
CASES = [
    (operation, name, fault)
    for operation, (_, _, call) in LAUNCHERS.items()
    for name in call()
    for fault in FAULTS
    if not (fault == "shape" and (operation, name) in ANY_ROWS or (name, fault, operation) in ANY_DIMENSIONS)
]


class Launched(Exception):
    pass


@pytest.fixture
def launch(monkeypatch):
    """Calls a launcher whose kernel cannot be reached unnoticed."""
    pytest.importorskip("triton")

    def run(operation, **changed):
        launcher, kernel, call = LAUNCHERS[operation]

        def launched(*args, **options):
            raise Launched

        monkeypatch.setattr(kernel, launched)
        return launcher(**(call() | changed))

    return run


def parts():
    """Tensors for an update that are parts of one: name -> arguments, and whether the kernel takes them."""
    whole, halves = torch.ones(4, 1, 2, 4, 8), torch.ones(1, 2, 4, 16)
    k_cache, v_cache = halves[..., :8], halves[..., 8:]
    return {
        "planes": ({"k_cache": whole[0], "v_cache": whole[1], "k": whole[2, :, :, :3], "v": whole[3, :, :, :3]}, True),
        "halves of rows": ({"k_cache": k_cache, "v_cache": v_cache}, True),
        "the same": ({"k_cache": k_cache, "v_cache": k_cache}, False),
        "one number": ({"k_cache": k_cache, "v_cache": halves[..., 7:15]}, False),
        "other strides": ({"k_cache": halves[..., :8], "v_cache": halves.view(1, 4, 4, 8)[:, 1:3]}, False),
        "k is read": ({"k_cache": whole[0], "v_cache": whole[1], "k": whole[0, :, :, 1:]}, False),
        "v between rows": ({"k_cache": k_cache, "v_cache": whole[0], "v": v_cache[:, :, :3]}, False),
    }


@pytest.mark.parametrize("case", parts())
def test_overlapping_memory_is_refused(case, launch):
    """As in the compiled kernels, which say so in the same words."""
    arguments, fits = parts()[case]
    call = LAUNCHERS["rope_kv_cache_update"][2]()
    arguments = {name: x for name, x in call.items() if name != "block_table"} | arguments
    sentence = "^[kv](_cache)?: expected memory apart from that of"
    with pytest.raises(Launched) if fits else pytest.raises(ValueError, match=sentence):
        launch("rope_kv_cache_update", block_table=None, **arguments)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=sentence):
        fastgpt.rope_kv_cache_update(**arguments)


@pytest.mark.parametrize("operation", LAUNCHERS)
def test_valid_arguments_are_launched(operation, launch):
    with pytest.raises(Launched):
        launch(operation)


@pytest.mark.parametrize("operation, name, fault", CASES)
def test_invalid_arguments_are_refused(operation, name, fault, launch):
    good = LAUNCHERS[operation][2]()
    with pytest.raises((TypeError, ValueError), match=r"^[a-z_]+: expected "):
        launch(operation, **{name: FAULTS[fault](good[name])})


@pytest.mark.parametrize(
    "operation, name, value",
    [
        ("linear", "x", torch.ones(33, 8)), ("linear", "x", torch.ones(0, 8)), ("linear", "weight", torch.ones(4, 16)[:, ::2]),
        ("linear", "activation", 9), ("linear", "activation", -1),
        ("moe", "up", torch.ones(4, 6, 16)[..., ::2]), ("moe", "down", torch.ones(4, 9, 3)[:, 1:]), ("moe", "activation", 6),
        ("linear_quantized", "x", torch.ones(33, 32)), ("linear_quantized", "x", torch.ones(0, 32)),
        ("linear_quantized", "x", torch.ones(2, 40)), ("linear_quantized", "blocks", torch.ones(4, 33, dtype=torch.uint8)),
        ("linear_quantized", "blocks", torch.ones(4, 68, dtype=torch.uint8)[:, ::2]), ("linear_quantized", "activation", 9),
        ("advance_", "lengths", torch.ones(4, dtype=torch.int32)[::2]),
        ("record_token_", "tokens", torch.ones(2, 3, dtype=torch.int64).t()), ("record_token_", "scores", torch.ones(2, 5)),
        ("record_token_", "ended", None), ("attention_forward", "k", torch.ones(1, 2, 4, 16)[..., ::2]),
        ("attention_with_kv_cache", "cos", torch.ones(4, 4)),
        ("kv_cache_update", "k_cache", torch.ones(1, 2, 4, 16, dtype=torch.int8)[..., ::2]),
        ("kv_cache_update", "k_cache", torch.ones(1, 1, 4, 8, dtype=torch.int8).expand(1, 2, 4, 8)),
        ("kv_cache_update", "v_scale", torch.ones(1, 2, 1).expand(1, 2, 4)), ("kv_cache_update", "k_scale", None),
        ("kv_cache_update", "k", torch.ones(1, 2, 3, 8).double()), ("rope_kv_cache_update", "cos", torch.ones(9, 5)),
        ("rope_kv_cache_update", "q", torch.ones(1, 4, 3, 16)[..., ::2]),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_arguments_are_refused(operation, name, value, launch):
    changed = {name: value}
    if operation.startswith("linear") and name == "x":
        changed["residual"] = torch.ones(len(value), 4)
    with pytest.raises((TypeError, ValueError), match="expected"):
        launch(operation, **changed)


def test_a_gated_activation_without_a_gate_is_refused(launch):
    """Which the kernels would leave out."""
    number = moe.ACTIVATION_NUMBERS["swiglu_clamped"]
    without_gate = {"activation": number, "gated": False, "up": torch.ones(4, 3, 8), "up_bias": torch.ones(4, 3)}
    with pytest.raises(ValueError, match="gated: expected True for activation='swiglu_clamped', got False"):
        launch("moe", **without_gate)
    with pytest.raises(Launched):
        launch("moe", **without_gate | {"activation": 3})


def test_caches_whose_rows_are_not_aligned_take_two_operations(launch):
    """A graph that torch.compile made has not seen their addresses."""
    unaligned = torch.ones(1, 2, 4, 9)[..., :8]
    out, lse = launch("attention_with_kv_cache", k_cache=unaligned)
    assert torch.equal(out, torch.ones(1, 2, 1, 8)) and lse.shape == (1, 2, 1)
