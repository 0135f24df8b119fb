"""The Triton attention kernels, forward and backward, against the reference.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, one_of_interpreted, passed, runs_kernel, starts_the_interpreter  # noqa: E402

from fastgpt.kernels import attention_arguments  # noqa: E402
from fastgpt.kernels import attention_forward as kernel  # noqa: E402
from fastgpt.kernels.attention_backward import attention_backward  # noqa: E402
from fastgpt.kernels.attention_rows import aligned_rows  # noqa: E402
from fastgpt.ops import attention as ops  # noqa: E402
from fastgpt.ops.attention import (
    attention_reference,  # noqa: E402
    operators,  # noqa: E402
)
from fastgpt.ops.attention.autograd import FusedAttention  # noqa: E402
from fastgpt.ops.attention.operators import attention_forward_triton  # noqa: E402
from fastgpt.ops.attention.reference import reference_of, varlen_reference_of  # noqa: E402
from fastgpt.ops.quantization import quantize  # noqa: E402
from fastgpt.testing.attention_features import FEATURES, inputs, options, paged  # noqa: E402
from fastgpt.testing.attention_parity import compare, run_triton, yardsticks  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAN = float("nan")


def random_inputs(B, H, H_kv, T, S, D, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    return random(B, H, T, D), random(B, H_kv, S, D), random(B, H_kv, S, D)


def lengths_of(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_parity(q, k, v, *, causal=True, scale=None, kv_lengths=None):
    """Runs the kernel on (q, k, v) and holds out and lse to the numerics contract. Returns both."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = dict(causal=causal, scale=scale, kv_lengths=kv_lengths, return_lse=True)
    out, lse = kernel.attention_forward(q, k, v, causal=causal, scale=scale, kv_lengths=kv_lengths)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    check((out, lse), lambda: attention_reference(q.double(), k.double(), v.double(), **options), weights=q.dtype)
    return out, lse


# B, H, H_kv, T, S, D, causal, kv_lengths
CASES = {
    "one query, one key": (1, 1, 1, 1, 1, 16, True, None),
    "decode": (2, 4, 1, 1, 77, 64, True, None),
    "decode, ragged": (3, 3, 1, 1, 50, 80, True, (0, 50, 17)),
    "few queries": (2, 3, 1, 5, 37, 40, True, None),
    "a quarter of a tile": (1, 2, 2, 16, 64, 64, True, None),
    "whole blocks": (1, 1, 1, 128, 128, 64, True, None),
    "off-block": (1, 4, 1, 131, 131, 32, True, None),
    "S > T": (1, 2, 2, 70, 201, 128, True, None),
    "S < T": (1, 3, 3, 150, 67, 16, True, None),
    "S < T, short": (1, 1, 1, 9, 4, 32, True, None),
    "ragged": (4, 1, 1, 33, 150, 96, True, (0, 150, 64, 20)),
    "ragged, not causal": (3, 2, 2, 20, 90, 64, False, (0, 90, 65)),
    "not causal": (1, 1, 1, 140, 75, 256, False, None),
    "head dim 256": (1, 1, 1, 40, 70, 256, True, None),
    "head dim 1": (1, 1, 1, 20, 20, 1, True, None),
    "head dim 33": (1, 2, 1, 20, 30, 33, True, (25,)),
    "no keys": (2, 1, 1, 3, 0, 16, True, None),
    "no queries": (2, 1, 1, 0, 8, 16, True, None),
    "no batch": (0, 1, 1, 3, 8, 16, True, None),
}


@runs_kernel
@one_of_interpreted(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype):
    *shape, causal, values = case
    q, k, v = random_inputs(*shape, dtype)
    kv_lengths = lengths_of(values)
    if values is not None:  # NaN wherever nothing may be read
        for b, length in enumerate(values):
            k[b, :, length:] = v[b, :, length:] = NAN
    out, _ = assert_parity(q, k, v, causal=causal, kv_lengths=kv_lengths)
    assert out.transpose(1, 2).is_contiguous()


@runs_kernel
def test_queries_without_keys_give_zeros():
    q, k, v = random_inputs(1, 2, 1, 40, 30, 64, torch.float32)
    out, lse = kernel.attention_forward(q, k, v, scale=0.125)
    assert torch.equal(out[:, :, :10], torch.zeros_like(out[:, :, :10]))
    assert torch.equal(lse[:, :, :10], torch.full_like(lse[:, :, :10], -math.inf))
    assert lse[:, :, 10:].isfinite().all()


@runs_kernel
@one_of_interpreted(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sinks", (False, True))
def test_a_bias_of_minus_infinity_hides_keys(sinks, dtype):
    """Some of a row, whole first tiles of it, and all: then zeros, lse -inf and zero gradients, as in the reference."""
    T, S = 40, 200
    q, k, v = random_inputs(1, 2, 1, T, S, 16, dtype)
    bias = torch.zeros(2, T, S, device=DEVICE, dtype=dtype)
    bias[0, :, ::3] = bias[:, 3:9, :150] = bias[:, 20:25] = -math.inf
    bias[:, :, 0] = -math.inf
    call = ops.Call(q, k, v, causal=False, scale=0.25, bias=bias, sinks=torch.zeros(2, device=DEVICE) if sinks else None)
    douts = torch.randn_like(q), torch.randn(1, 2, T, device=DEVICE)
    actual = run_triton(call, douts)
    for name, yardstick in yardsticks(call, None, douts).items():
        check(actual[name], yardstick, name=name)
    for name, number in (("out", 0.0), ("lse", -math.inf), ("dq", 0.0)):
        assert (actual[name][:, :, 20:25] == number).all()
    k[:, :, 0] = math.inf  # whose scores are infinite and NaN before the bias
    again = kernel.attention_forward(**call._replace(k=k)._asdict())
    assert all(torch.equal(x, actual[name]) for x, name in zip(again, ("out", "lse")))


@runs_kernel
@pytest.mark.parametrize("dtype, sinks", ((torch.float32, False), (torch.float16, True)), ids=str)
@pytest.mark.parametrize("how", ("bias", "bias of queries", "mask", "lengths", "causal"))
def test_rows_that_see_no_key_give_zeros_whatever_keys_hold(how, dtype, sinks):
    """In results and gradients, though keys and values are NaN."""
    T, S = 40, 35
    q, k, v = random_inputs(1, 2, 1, T, S, 16, dtype)
    hidden = torch.zeros(T, 1, dtype=torch.bool, device=DEVICE)
    hidden[:5], hidden[20] = True, how != "causal"
    bias = torch.zeros(T, 1, device=DEVICE, dtype=dtype).masked_fill(hidden, -math.inf)
    options = {
        "bias": {"bias": bias.expand(T, S).contiguous()},
        "bias of queries": {"bias": bias},
        "mask": {"mask": ~hidden},
        "lengths": {"kv_lengths": lengths_of((0,))},
        "causal": {},  # the first T - S queries are before the first key
    }[how]
    if how == "lengths":
        hidden[:] = True
    sinks = torch.randn(2, device=DEVICE) if sinks else None
    call = ops.Call(q, k, v, causal=how == "causal", scale=0.25, sinks=sinks, **options)
    douts = torch.randn_like(q), torch.randn(1, 2, T, device=DEVICE)
    actual = run_triton(call._replace(k=torch.full_like(k, NAN), v=torch.full_like(v, NAN)), douts)
    for name, expected in (("out", 0.0), ("lse", -math.inf), ("dq", 0.0)):
        assert (actual[name][:, :, hidden[:, 0]] == expected).all(), name
    if how == "lengths":  # none of which is read
        assert all((x == 0).all() for name, x in actual.items() if name in ("dk", "dv", "dsinks"))


@runs_kernel
@pytest.mark.parametrize("how", ("bias", "mask", "causal", "window"))
def test_a_hidden_key_is_not_seen_whatever_it_is(how):
    """Its score is replaced, not added to. Values that some queries see meet weights of zero of others in a product of matrices,
    and must be finite."""
    T, S, key = 40, 70, 33
    q, k, v = random_inputs(1, 2, 1, T, S, 16, torch.float32)
    hidden = torch.zeros(T, S, dtype=torch.bool, device=DEVICE)
    hidden[:, key] = True
    seeing = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    options = {
        "bias": {"bias": torch.randn(2, T, S, device=DEVICE).masked_fill(hidden, -math.inf), "causal": False},
        "mask": {"mask": ~hidden, "causal": False},
        "causal": {},
        "window": {"window": 8, "causal": True},
    }[how]
    if how in ("causal", "window"):  # query i is at position i + S - T
        position = torch.arange(T, device=DEVICE) + S - T
        seeing = (position >= key) & (position < key + options.get("window", S))
    expected = kernel.attention_forward(q, k, v, scale=0.25, **options)
    for number in (NAN, math.inf):
        k[:, :, key] = number
        for actual, wanted in zip(kernel.attention_forward(q, k, v, scale=0.25, **options), expected):
            assert torch.equal(actual[:, :, ~seeing], wanted[:, :, ~seeing])


@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("how", ("mask", "bias", "mask and bias", "window"))
def test_masked_values_do_not_affect_the_output(how, arch, dtype, monkeypatch):
    """Whatever it is, in whichever tile, with bulk copies and without. One that a query sees is seen."""
    run_as_on(arch, monkeypatch)
    T, S, keys = 70, 200, [0, 3, 150]
    q, k, v = random_inputs(1, 2, 1, T, S, 16, dtype)
    mask = torch.rand(T, S, device=DEVICE) < 0.7
    bias = torch.zeros(2, T, S, device=DEVICE, dtype=dtype)
    if how == "mask and bias":  # each hides the key from half of the queries
        mask[:, keys] = torch.arange(T, device=DEVICE)[:, None] % 2 == 0
        bias[:, ::2, keys] = -math.inf
    mask[:, keys] &= how != "mask"
    if how == "bias":
        bias[..., keys] = -math.inf
    options = {"causal": False, "mask": mask, "bias": bias} if how != "window" else {"window": 50}
    if how in ("mask", "bias"):
        del options[{"mask": "bias", "bias": "mask"}[how]]
    if how == "window":  # query 0 sees 81 keys up to its position, 130
        keys = [0, 78, 80]
    expected = kernel.attention_forward(q, k, v, scale=0.25, **options)
    for number in (NAN, math.inf):
        k[:, :, keys] = v[:, :, keys] = number
        actual = kernel.attention_forward(q, k, v, scale=0.25, **options)
        assert all(torch.equal(x, wanted) for x, wanted in zip(actual, expected, strict=True))
    v[:, :, 199] = NAN
    out, _ = kernel.attention_forward(q, k, v, scale=0.25, **options)
    sees = mask[:, 199] if "mask" in options else torch.ones(T, dtype=torch.bool, device=DEVICE)
    assert out[:, :, sees][:, :, -1].isnan().all()


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ({}, {"causal": False, "window": 90}, {"sinks": (0.5, -1.0)}), ids=str)
def test_scores_of_minus_infinity_hide_keys(options, dtype):
    """Whole first tiles of them, without a bias, and all of a sequence."""
    T, S, hidden = 70, 330, 290
    q, k, v = random_inputs(2, 2, 1, T, S, 16, dtype)
    q, k[0, :, :hidden], k[1] = q.abs() + 0.25, -math.inf, -math.inf
    options = {"scale": 0.25, "causal": True} | options
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device=DEVICE)
    out, lse = kernel.attention_forward(q, k, v, **options)
    assert not out[1].any() and (lse[1] == -math.inf).all()
    rest = [x[:1].double() for x in (q, k[:, :, hidden:], v[:, :, hidden:])]
    check((out[:1], lse[:1]), lambda: attention_reference(*rest, **options, return_lse=True), weights=dtype)


@runs_kernel
@pytest.mark.parametrize("T, S", ((20, 40), (40, 20)))
def test_windows_beyond_all_keys(T, S):
    """Hide no key, in results and gradients, also of queries before the first key."""
    call = ops.Call(*random_inputs(1, 1, 1, T, S, 16, torch.float32), causal=False, scale=0.25)
    douts = torch.randn_like(call.q), torch.zeros(1, 1, T, device=DEVICE)
    expected = run_triton(call, douts)
    for window in (2**31 - 1, 2**40):
        actual = run_triton(call._replace(window=window), douts)
        assert all(torch.equal(actual[name], x) for name, x in expected.items())


@runs_kernel
@pytest.mark.parametrize("causal", (True, False))
def test_lengths_are_clamped_to_the_capacity(causal):
    q, k, v = random_inputs(2, 1, 1, 3, 20, 16, torch.float32)
    k, v = k[:, :, :12], v[:, :, :12]
    beyond = kernel.attention_forward(q, k, v, causal=causal, scale=0.25, kv_lengths=lengths_of((19, -70)))
    clamped = kernel.attention_forward(q, k, v, causal=causal, scale=0.25, kv_lengths=lengths_of((12, 0)))
    for actual, expected in zip(beyond, clamped, strict=True):
        assert torch.equal(actual, expected)


def packed(x):  # (B, H, N, D) inside (B, N, 3, H, D), as one projection to q, k and v leaves it
    B, H, N, D = x.shape
    base = torch.full((B, N, 3, H, D), NAN, dtype=x.dtype, device=x.device)
    base[:, :, 1] = x.transpose(1, 2)
    return base[:, :, 1].transpose(1, 2)


def sequence_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


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
@pytest.mark.parametrize("head_dim", (33, 64))
@pytest.mark.parametrize("view", (packed, sequence_first, sliced, misaligned, expanded))
def test_parity_on_views(view, head_dim):
    q, k, v = random_inputs(2, 4, 2, 21, 35, head_dim, torch.float16)
    kv_lengths = lengths_of((35, 35, 20, 20))[::2]
    assert_parity(view(q), view(k), view(v), kv_lengths=kv_lengths)


def run_as_on(arch, monkeypatch):
    """Launches from here on take the tiles and copies of an architecture."""
    for module in (kernel, attention_arguments):
        monkeypatch.setattr(module, "architecture", lambda device: arch)


@runs_kernel
@pytest.mark.parametrize("shape", ((2, 4, 2, 70, 150, 64), (1, 2, 1, 40, 21, 40)), ids=str)
def test_parity_without_bulk_copies(shape, monkeypatch):
    """What chips before 9.0 run, forward and backward."""
    run_as_on(80, monkeypatch)
    backward_parity(*inputs(*shape, torch.float16, DEVICE), {})


@runs_kernel
def test_where_bulk_copies_are_taken(monkeypatch):
    run_as_on(90, monkeypatch)
    q, k, v = (aligned_rows(x) for x in random_inputs(2, 2, 2, 20, 20, 33, torch.float16))
    assert attention_arguments.have_bulk_copies(q, packed(k), v)
    assert not attention_arguments.have_bulk_copies(q, k, expanded(v))
    assert not attention_arguments.have_bulk_copies(q.float(), k.float(), v.float())
    assert not attention_arguments.have_bulk_copies(q, k[:, :, :0], v[:, :, :0])
    run_as_on(80, monkeypatch)
    assert not attention_arguments.have_bulk_copies(q, k, v)


@runs_kernel
@pytest.mark.parametrize("D, D_v, dtype, arch", (
    (192, 128, torch.float16, 80), (192, 128, torch.float16, 90), (20, 90, torch.float16, 90), (160, 24, torch.float32, 80),
    (576, 512, torch.float16, 80),
), ids=str)  # fmt: skip
def test_values_of_another_head_dim(D, D_v, dtype, arch, monkeypatch):
    """With bulk copies, which 90 has, and without. The gradients of wide heads are the reference's."""
    run_as_on(arch, monkeypatch)
    q, k, _ = random_inputs(1, 2, 1, 20, 37, D, dtype)
    v = torch.randn(1, 1, 37, D_v, device=DEVICE).to(dtype)
    call = ops.Call(q, k, v, scale=D**-0.5)
    douts = torch.randn(1, 2, 20, D_v, device=DEVICE).to(dtype), torch.randn(1, 2, 20, device=DEVICE)
    if D <= 256:
        actual, expected = run_triton(call, douts), yardsticks(call, None, douts)
        assert actual.keys() == expected.keys()
        for name, yardstick in expected.items():
            check(actual[name], yardstick, name=name)
        return
    out, lse = kernel.attention_forward(**call._asdict())
    assert out.transpose(1, 2).is_contiguous()
    double = call._replace(q=q.double(), k=k.double(), v=v.double())
    check((out, lse), lambda: reference_of(double, True), weights=dtype)
    with pytest.raises(ValueError, match="^q: expected head dims up to 256 of q, k and v, got 576 and 512"):
        run_triton(call, douts)


@runs_kernel
def test_packed_values_of_another_head_dim():
    q, k, v = torch.randn(1, 2, 30, 20), torch.randn(1, 1, 41, 20), torch.randn(1, 1, 41, 90)
    call = ops.Call(*(x.to(DEVICE) for x in (q, k, v)), scale=0.2)
    packing = ops.Packing(lengths_of((0, 12, 30)), lengths_of((0, 5, 41)), 18, 36)
    options = dict(scale=0.2, **packing._asdict())
    del options["max_seqlen_k"]
    actual = kernel.attention_forward(call.q, call.k, call.v, **options)
    double = call._replace(**{name: getattr(call, name).double() for name in "qkv"})
    check(actual, lambda: varlen_reference_of(double, packing), weights=torch.float32)


@runs_kernel
@pytest.mark.parametrize("scale", (3.0, 1.0, 0.0, -0.5))
def test_parity_at_any_scale(scale):
    q, k, v = random_inputs(1, 2, 1, 30, 40, 64, torch.float32)
    assert_parity(q, k, v, scale=scale)


# B, H, H_kv, T, S, D
FEATURE_SHAPES = {
    "off-block": (2, 4, 2, 37, 70, 40),
    "short": (2, 3, 1, 3, 33, 64),
    "S < T": (1, 2, 2, 40, 21, 16),
}


def gradients(function, tensors, douts):
    """out, lse and the gradients by `tensors` (a dict) of a function that takes them as keywords."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    results = function(**leaves)
    torch.autograd.backward(results, [dout.to(x.dtype) for x, dout in zip(results, douts)])
    return [x.detach() for x in results], {name: x.grad for name, x in leaves.items()}


def backward_parity(q, k, v, options):
    """The kernels' results and gradients against the reference's, by the numerics contract."""
    call = ops.Call(q, k, v, **{"scale": 1.0 / math.sqrt(q.shape[-1])} | options)
    names = set()
    for name, actual, yardstick in compare(call, run_triton):
        if name.startswith("d"):
            assert actual.dtype == getattr(call, name[1:]).dtype
        check(actual, yardstick, name=name)
        names.add(name)
    assert names == {"out", "lse", "dq", "dk", "dv"} | {f"d{name}" for name in ("bias", "sinks") if name in options}


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEATURE_SHAPES.values(), ids=FEATURE_SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_and_their_gradients(feature, shape, dtype):
    if INTERPRETED and dtype is not torch.float32 and shape != FEATURE_SHAPES["S < T"]:
        pytest.skip("the interpreter is slow: one shape for 16 bits")
    B, H, H_kv, T, S, D = shape
    q, k, v = inputs(*shape, dtype, DEVICE)
    arguments = options(feature, B, H, T, S, dtype, DEVICE)
    backward_parity(q, k, v, arguments)


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("shape", FEATURE_SHAPES.values(), ids=FEATURE_SHAPES)
@pytest.mark.parametrize("feature", ("plain", "everything", "bias of keys"))
def test_gradients_are_the_same_bits_on_every_run(feature, shape):
    B, H, H_kv, T, S, D = shape
    arguments = {"scale": 0.2} | options(feature, B, H, T, S, torch.float16, DEVICE)
    call = ops.Call(*inputs(*shape, torch.float16, DEVICE), **arguments)
    douts = torch.randn_like(call.q), torch.zeros(B, H, T, device=DEVICE)
    results, again = run_triton(call, douts), run_triton(call, douts)
    for name, x in results.items():
        assert torch.equal(x, again[name]), name


class Allocations(TorchDispatchMode):
    """The most bytes that any result of PyTorch has, while it is on."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@runs_kernel
def test_no_matrix_of_scores_is_held():
    T = 192
    call = ops.Call(*inputs(1, 2, 1, T, T, 16, torch.float32, DEVICE), scale=0.25, sinks=torch.zeros(2, device=DEVICE))
    douts = torch.randn_like(call.q), torch.randn(1, 2, T, device=DEVICE)
    with Allocations() as allocations:
        run_triton(call, douts)
    assert 0 < allocations.largest <= call.q.nbytes


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("head_dim", (80, 128, 192, 256))
def test_gradients_at_larger_head_dims(head_dim):
    q, k, v = inputs(1, 2, 1, 35, 35, head_dim, torch.float32, DEVICE)
    backward_parity(q, k, v, {})


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("view", (packed, sequence_first, misaligned, expanded))
def test_gradients_on_views(view):
    q, k, v = inputs(2, 4, 2, 21, 35, 33, torch.float16, DEVICE)
    backward_parity(view(q), view(k), view(v), {"kv_lengths": lengths_of((35, 20))})


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("kv_dtype", (None, torch.int8, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("page", (None, 1, 16, 48))
def test_paged_and_quantized(page, kv_dtype, dtype):
    q, k, v = inputs(3, 4, 2, 20, 90, 40, dtype, DEVICE)
    arguments = {"kv_lengths": lengths_of((0, 90, 33)), "causal": True, "scale": 0.2}
    if kv_dtype is not None:
        (k, k_scale), (v, v_scale) = quantize(k, kv_dtype), quantize(v, kv_dtype)
        arguments |= {"k_scale": k_scale, "v_scale": v_scale}
    if page is not None:
        (k, table), (v, _) = paged(k, page), paged(v, page)
        for name in ("k_scale", "v_scale"):
            if name in arguments:
                arguments[name] = paged(arguments[name], page)[0]
        table[0] = 1 << 30
        table[2, -(-33 // page) :] = -1
        arguments["block_table"] = table
    out, lse = kernel.attention_forward(q, k, v, **arguments)
    exact = (k, v) if kv_dtype is not None else (k.double(), v.double())
    check((out, lse), lambda: attention_reference(q.double(), *exact, **arguments, return_lse=True), weights=dtype)


@pytest.fixture
def triton_serves_the_cpu(monkeypatch):
    """Under the interpreter: the operations' CUDA kernels serve the CPU too."""
    if not INTERPRETED:
        yield
        return
    library = torch.library.Library("fastgpt", "IMPL")
    for name in ("attention_backward", "attention_varlen_forward", "attention_varlen_backward"):
        library.impl(name, getattr(operators, f"{name}_triton"), "CPU")
    monkeypatch.setattr(operators, "attention_forward", attention_forward_triton)  # the CPU has one of its own
    yield
    library._destroy()


@pytest.mark.slow
@runs_kernel
@pytest.mark.parametrize("feature", ("plain", "bias of keys", "sinks", "dropout", "mask", "lengths", "alibi", "everything"))
def test_autograd(feature, triton_serves_the_cpu):
    """The operation with its gradients, as `attention` calls it where Triton serves."""
    q, k, v = inputs(2, 4, 2, 20, 33, 16, torch.float32, DEVICE)
    arguments = {"scale": 0.25} | options(feature, 2, 4, 20, 33, torch.float32, DEVICE)
    differentiable = {"q": q, "k": k, "v": v}
    differentiable |= {name: arguments.pop(name) for name in ("bias", "sinks") if name in arguments}
    douts = torch.randn_like(q), torch.zeros(2, 4, 20, device=DEVICE)

    def actual(**tensors):
        return FusedAttention.apply(*ops.Call(**tensors, **arguments), None)

    def reference(**tensors):
        return attention_reference(**tensors, **arguments, return_lse=True)

    doubled = {name: x.double() for name, x in differentiable.items()}
    check(gradients(actual, differentiable, douts), lambda: gradients(reference, doubled, douts))


PACKED_OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 9},
    "extras": {"window": 9, "alibi_slopes": (0.5, 0.25, 0.1, 0.0) * 2, "softcap": 2.0},
}


@runs_kernel
@pytest.mark.parametrize("arguments", PACKED_OPTIONS.values(), ids=PACKED_OPTIONS)
def test_autograd_of_packed_sequences(arguments, triton_serves_the_cpu):
    """One of them has no queries, and one fewer keys than queries."""
    lengths_q, lengths_k = (5, 0, 33, 1, 12), (9, 4, 33, 40, 5)
    q, k, v = inputs(1, 8, 2, sum(lengths_q), sum(lengths_k), 16, torch.float32, DEVICE)
    offsets = [lengths_of([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k)]
    packing = ops.Packing(*offsets, max(lengths_q), max(lengths_k))
    arguments = {"scale": 0.25} | arguments
    for name, dtype in (("dropout_seed", torch.int64), ("alibi_slopes", torch.float32)):
        if name in arguments:
            arguments[name] = torch.tensor(arguments[name], dtype=dtype, device=DEVICE).view(-1)
    differentiable = {"q": q, "k": k, "v": v, "sinks": torch.randn(8, device=DEVICE)}
    fully_masked = varlen_reference_of(ops.Call(**differentiable, **arguments), packing)[1] == -math.inf
    douts = torch.randn_like(q), torch.randn(1, 8, sum(lengths_q), device=DEVICE).masked_fill(fully_masked, 0.0)

    def actual(**tensors):
        return FusedAttention.apply(*ops.Call(**tensors, **arguments), packing)

    def reference(**tensors):
        return varlen_reference_of(ops.Call(**tensors, **arguments), packing)

    doubled = {name: x.double() for name, x in differentiable.items()}
    check(gradients(actual, differentiable, douts), lambda: gradients(reference, doubled, douts))


@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_rows_past_the_last_packed_sequence_take_no_part_in_gradients(dtype, monkeypatch):
    """Whatever they hold, and memory that no program writes."""
    offsets, scale = lengths_of((0, 5, 17)), 0.25
    q, k, v = inputs(1, 4, 2, 24, 24, 16, dtype, DEVICE)
    dout, dlse = torch.randn_like(q), torch.randn(1, 4, 24, device=DEVICE)
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 12}
    options = {"scale": scale, "sinks": torch.randn(4, device=DEVICE), **packing}
    monkeypatch.setattr(kernel.torch, "empty_like", lambda x: torch.full_like(x, NAN))

    def results(rows):
        given = [x[:, :, :rows] for x in (q, k, v, dout, dlse)]
        out, lse = kernel.attention_forward(*given[:3], **options)
        dq, dk, dv, _, dsinks = attention_backward(*given[3:], *given[:3], out, lse, max_seqlen_k=12, **options)
        return (out, lse, dq, dk, dv), dsinks

    expected, dsinks = results(17)
    for x in (q, k, v, dout, dlse):
        x[:, :, 17:] = NAN
    actual, dsinks_too = results(24)
    assert dsinks.isfinite().all() and torch.equal(dsinks, dsinks_too)
    for wanted, x in zip(expected, actual, strict=True):
        assert torch.equal(x[:, :, :17], wanted)
    assert all((x[:, :, 17:] == 0).all() for x in (actual[0], *actual[2:])) and (actual[1][:, :, 17:] == -math.inf).all()


@runs_kernel
def test_backward_operations_pass_opcheck(triton_serves_the_cpu):
    q, k, v = inputs(1, 4, 2, 5, 9, 16, torch.float32, DEVICE)
    sinks, bias = torch.randn(4, device=DEVICE), torch.randn(4, 1, 9, device=DEVICE)
    out, lse = kernel.attention_forward(q, k, v, scale=0.25, sinks=sinks, bias=bias)
    dout = torch.randn_like(out)
    operations = torch.ops.fastgpt
    tests = ("test_schema", "test_faketensor")
    arguments = (dout, None, out, lse, True, q, k, v, True, 0.25, None, None, None, sinks, None, bias)
    torch.library.opcheck(operations.attention_backward.default, arguments, test_utils=tests)
    packing = (lengths_of((0, 2, 5)), lengths_of((0, 4, 9)), 3, 5)
    forward = (*packing, q, k, v, True, 0.25, None, None, None, sinks)
    torch.library.opcheck(operations.attention_varlen_forward.default, forward, test_utils=tests)
    arguments = (dout, None, out, lse, *forward)
    torch.library.opcheck(operations.attention_varlen_backward.default, arguments, test_utils=tests)


@runs_kernel
def test_large_scores_do_not_overflow():
    q, k, v = random_inputs(1, 1, 1, 40, 40, 64, torch.float32)
    q *= 1e4
    out, _ = assert_parity(q, k, v)
    assert out.isfinite().all()


LARGE_CASES = {
    "GPT-2": (4, 12, 12, 1024, 1024, 64, True, None),
    "Llama": (2, 32, 8, 1500, 1500, 128, True, None),
    "chunked prefill": (3, 8, 2, 300, 2500, 96, True, (300, 2500, 1111)),
    "decode": (8, 16, 4, 1, 4096, 128, True, (1, 4096, 17, 64, 65, 2000, 0, 4095)),
    "wide head": (1, 8, 1, 700, 900, 256, True, None),
    "not causal": (2, 4, 4, 333, 777, 80, False, None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_parity_at_size(case, dtype):
    *shape, causal, values = case
    q, k, v = random_inputs(*shape, dtype)
    assert_parity(q, k, v, causal=causal, kv_lengths=lengths_of(values))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    q, k, v = random_inputs(3, 2, 2, 40, 48, 64, torch.float16)
    pool = torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE)
    far_batch = pool.as_strided(k.shape, (2**30, 48 * 64, 64, 1)).copy_(k)  # batch 2 begins at element 2^31
    assert_parity(q, far_batch, v)
    far_row = pool.as_strided(k.shape, (64, 192, 3 * 2**24, 1)).copy_(k)  # row 43 begins past element 2^31
    assert_parity(q, far_row, v)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ("heads of k", "rows of a mask", "rows of a bias", "heads of a mask", "heads of a bias"))
def test_offsets_beyond_32_bits_in_the_backward(far):
    """The same bits as near the beginning."""
    q, k, v = random_inputs(1, 6, 3, 40, 48, 64, torch.float16)
    arguments = {"scale": 0.125, "causal": False}
    if "mask" in far:
        arguments["mask"] = torch.rand(1, 6, 40, 48, device=DEVICE) < 0.6
    if "bias" in far:
        arguments["bias"] = torch.randn(1, 6, 40, 48, device=DEVICE).half()
    near = ops.Call(q, k, v, **arguments)
    name = far.split()[-1]
    x = getattr(near, name)
    heads, rows = x.shape[1:3]
    step = 2**32 // (heads if "heads" in far else rows) // 64 * 64  # rows begin at multiples of 16 bytes
    strides = (0, step, x.shape[3], 1) if "heads" in far else (0, x.shape[3], step, 1)
    pool = torch.empty(2**32 + 2**16, dtype=x.dtype, device=DEVICE)  # the last head, or row, begins past element 2^31
    moved = near._replace(**{name: pool.as_strided(x.shape, strides).copy_(x)})
    douts = torch.randn_like(q), torch.randn(1, 6, 40, device=DEVICE)
    expected, actual = run_triton(near, douts), run_triton(moved, douts)
    assert all(torch.equal(actual[result], y) for result, y in expected.items())


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    q, k, v = random_inputs(2, 4, 2, 1, 100, 64, torch.float16)
    kv_lengths = lengths_of((100, 30))
    kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)
    kv_lengths.copy_(lengths_of((7, 90)))
    q.neg_()
    graph.replay()
    expected_out, expected_lse = kernel.attention_forward(q, k, v, scale=0.125, kv_lengths=kv_lengths)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", ["not slow and not exhaustive", pytest.param("slow or exhaustive", marks=pytest.mark.exhaustive)]
)
@starts_the_interpreter
def test_under_the_interpreter(which):
    assert passed(__file__, which) >= 2 * len(CASES)
