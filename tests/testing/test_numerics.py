"""The numerics contract finds planted faults, in every dtype, and passes what is right on any machine."""

import doctest
import importlib
import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch

from fastgpt import attention_reference
from fastgpt.ops import attention as ops
from fastgpt.testing import attention_parity, numerics
from fastgpt.testing.attention_features import inputs
from fastgpt.testing.draws import normal

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.testing.BlindSpot")  # of small shapes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"small": (1, 2, 2, 7, 9, 16), "large": (1, 4, 2, 48, 96, 32)}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def in_turn(names):
    """(name, dtype, shape): each name in a dtype and shape of its own, and in the others where tests are exhaustive."""
    drawn = list(itertools.product(DTYPES, SHAPES))
    return [
        pytest.param(
            name, dtype, SHAPES[shape], id=f"{name}-{dtype}-{shape}",
            marks=() if j == i % len(drawn) else pytest.mark.exhaustive,
        )
        for i, name in enumerate(names) for j, (dtype, shape) in enumerate(drawn)
    ]  # fmt: skip


class Faults:
    """Attention over blocks of keys as a kernel computes it, with one fault or none: what each name changes is below."""

    def __init__(self, fault=None):
        self.fault = fault

    def __call__(self, q, k, v, bias=None):
        fault, (B, H, T, D), (S, block) = self.fault, q.shape, (k.shape[2], 4)
        dtype, group = q.dtype, H // k.shape[1]
        if fault == "a head swapped":
            k = torch.cat([k[:, 1:], k[:, :1]], 1)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        q, k, v = (x.float() for x in (q, k, v))
        scale = D**-0.5 * (1.01 if fault == "1% in the scale" else 1.0)
        position = torch.arange(T).view(-1, 1) + S - T - torch.arange(S)
        hidden = position < (-1 if fault == "mask off by one" else 0)
        if fault == "the last key block dropped":
            hidden = hidden | (torch.arange(S) >= S - block)
        if fault == "TF32 products":
            q, k, v = (rounded(x, torch.bfloat16 if dtype is torch.bfloat16 else torch.float16) for x in (q, k, v))
        scores = q @ k.mT * scale
        if bias is not None:
            scores = scores + (bias.detach() if fault == "the bias not differentiated" else bias).float()
        scores = scores.masked_fill(hidden, -torch.inf)
        largest, sums, out = scores.new_full((B, H, T, 1), -torch.inf), 0.0, 0.0
        for j in range(0, S, block):
            part = scores[..., j : j + block]
            new = torch.maximum(largest, part.detach().amax(-1, keepdim=True))
            weights = (part - new.clamp(min=-1e30)).exp()
            rescale = (largest - new.clamp(min=-1e30)).exp()
            if fault == "a rescale missing" and j == S // 2 // block * block:
                rescale = rescale.masked_fill(largest > -torch.inf, 1.0)
            rounding = weights.to(dtype).float()
            sums, out = sums * rescale + weights.sum(-1, keepdim=True), out * rescale + rounding @ v[:, :, j : j + block]
            if fault == "sums in 16 bits":
                low = torch.float16 if dtype is torch.float32 else dtype
                sums, out = rounded(sums, low), rounded(out, low)
            largest = new
        lse = (largest + sums.log()).squeeze(-1)
        if fault == "a term of the gradient missing":  # delta, the derivative of the softmax's denominator
            sums = sums.detach()
        out = (out / sums).to(dtype)
        if fault in ("NaN", "infinity"):
            out = out.clone()
            out.data[0, 0, -1, 0] = torch.nan if fault == "NaN" else torch.inf
        return out, lse


def rounded(x, dtype):
    """With the derivative of the identity, as a kernel's backward would have it."""
    return x + (x.to(dtype).float() - x).detach()


FORWARD = [
    "mask off by one", "1% in the scale", "a head swapped", "the last key block dropped", "a rescale missing", "NaN", "infinity",
]  # fmt: skip


@pytest.mark.parametrize("feature, dtype, shape", in_turn(["plain", "bias"]))
def test_what_is_right_passes(feature, dtype, shape):
    for seed in range(2):
        attention_parity.check_attention(Faults(), feature, shape=shape, dtype=dtype, seed=seed)


@pytest.mark.parametrize("fault, dtype, shape", in_turn(FORWARD))
def test_planted_faults(fault, dtype, shape):
    with pytest.raises(AssertionError, match="exceeds the bound|NaN differ"):
        attention_parity.check_attention(Faults(fault), shape=shape, dtype=dtype, gradients=False)


@pytest.mark.parametrize("fault, dtype, shape", in_turn(["a term of the gradient missing", "the bias not differentiated"]))
def test_planted_faults_of_gradients(fault, dtype, shape):
    attention_parity.check_attention(Faults(fault), "bias", shape=shape, dtype=dtype, gradients=False)
    with pytest.raises(AssertionError, match="d(q|k|bias): .*(exceeds|no gradient)"):
        attention_parity.check_attention(Faults(fault), "bias", shape=shape, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("fault", ["no fault", *FORWARD[:5]])
def test_planted_faults_show_in_gradients(fault, dtype):
    """Faults that change results are found by the gradients alone: 1% of few numbers is less than rounding to bf16."""
    shape = SHAPES["large"]
    call = ops.Call(*inputs(*shape, dtype), scale=shape[-1] ** -0.5)

    def run(call, douts):
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        results = Faults(fault)(*leaves)
        names = ("out", "lse", "dq", "dk", "dv")
        return {name: x.detach() for name, x in zip(names, (*results, *torch.autograd.grad(results, leaves, douts)))}

    found = {name: numerics.compare(x, yardstick) for name, x, yardstick in attention_parity.compare(call, run)}
    assert any(found[name].share > 1 for name in ("dq", "dk", "dv")) == (fault != "no fault")


def faulty_attention(fault):
    """Attention with a fault that some inputs cannot reveal."""

    def function(q, k, v, kv_lengths=None, **options):
        T, S = q.shape[2], k.shape[2]
        if fault == "another sequence":
            k, v = k.roll(1, 0), v.roll(1, 0)
        if fault == "another head":
            k, v = k.roll(1, 1), v.roll(1, 1)
        if fault == "another order":
            k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        if fault == "aligned to the first":
            causal = options.pop("causal", True)
            inside = torch.ones(1, 1, T, S, dtype=torch.bool)
            if kv_lengths is not None:
                inside = inside & (torch.arange(S) < kv_lengths.view(-1, 1, 1, 1))
            options |= {"mask": inside.tril() if causal else inside, "causal": False}
        else:
            options["kv_lengths"] = kv_lengths
        return attention_reference(q, k, v, **options)

    return function


@pytest.mark.parametrize(
    "fault, feature, blind_shape, warning, revealing_shape",
    [
        ("another sequence", "plain", (1, 4, 2, 5, 9, 16), "keys of another sequence", (2, 4, 2, 5, 9, 16)),
        ("another head", "plain", (2, 4, 1, 5, 9, 16), "keys of another head", (2, 4, 2, 5, 9, 16)),
        ("another order", "plain", (2, 4, 1, 5, 9, 16), "keys of another head", (2, 4, 2, 5, 9, 16)),
        ("another order", "plain", (2, 4, 4, 5, 9, 16), "key heads that are shared in another order", (2, 4, 2, 5, 9, 16)),
        ("aligned to the first", "plain", (2, 4, 2, 9, 9, 16), "a mask aligned to the first key", (2, 4, 2, 5, 9, 16)),
        ("aligned to the first", "bias", (2, 4, 2, 9, 9, 16), "a mask aligned to the first key", (2, 4, 2, 9, 8, 16)),
    ],
)
def test_blind_spots(fault, feature, blind_shape, warning, revealing_shape):
    """The faulty function passes with the blind shape only, with a warning; a feature that reveals the fault has none."""
    with pytest.warns(attention_parity.BlindSpot, match=f"^shape: .* cannot reveal {warning}"):
        attention_parity.check_attention(faulty_attention(fault), feature, shape=blind_shape, gradients=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", attention_parity.BlindSpot)
        with pytest.raises(AssertionError, match="exceeds the bound"):
            attention_parity.check_attention(faulty_attention(fault), feature, shape=revealing_shape, gradients=False)
        if fault == "aligned to the first":
            with pytest.raises(AssertionError, match="exceeds the bound|NaN differ"):
                attention_parity.check_attention(faulty_attention(fault), "lengths", shape=blind_shape, gradients=False)
        attention_parity.check_attention(faulty_attention(None), feature, shape=revealing_shape, gradients=False)
        for always in ("not causal", "mask"):  # where nothing depends on positions
            attention_parity.check_attention(faulty_attention(None), always, shape=(2, 4, 2, 9, 9, 16), gradients=False)
        attention_parity.check_attention(faulty_attention(None), gradients=False)


@every_dtype
def test_sums_in_too_low_a_precision(dtype):
    with pytest.raises(AssertionError, match="exceeds the bound"):
        attention_parity.check_attention(Faults("sums in 16 bits"), shape=SHAPES["large"], dtype=dtype, gradients=False)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.exhaustive), torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [True, False], ids=["16 bits", "fp32"])
def test_gradients_summed_in_too_low_a_precision(low, dtype):
    """Query by query, as PyTorch adds up the derivatives of a tensor that is used again and again: in its dtype. Of 512
    numbers or more it shows; what matrix products take, which may be rounded to 16 bits, errs as much as sums of fewer."""
    call = ops.Call(*inputs(1, 4, 1, 128, 128, 16, dtype), scale=0.25)

    def attend(q, k, v):
        outs = []
        for i in range(128):
            scores = q[:, :, i : i + 1].float() @ k[:, :, : i + 1].float().expand(-1, 4, -1, -1).mT * 0.25
            outs.append((scores.softmax(-1) @ v[:, :, : i + 1].float().expand(-1, 4, -1, -1), scores.logsumexp(-1)))
        out, lse = (torch.cat(parts, 2) for parts in zip(*outs))
        return out.to(dtype), lse

    def run(call, douts):
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        results = attend(*(leaves if low else [x.float() for x in leaves]))
        names = ("out", "lse", "dq", "dk", "dv")
        return {name: x.detach() for name, x in zip(names, (*results, *torch.autograd.grad(results, leaves, douts)))}

    shares = {name: numerics.compare(x, yardstick).share for name, x, yardstick in attention_parity.compare(call, run)}
    assert (shares["dv"] > 1) == low and max(shares[name] for name in ("out", "lse", "dq")) <= 1


@every_shape
def test_products_in_tf32(shape):
    with pytest.raises(AssertionError, match="exceeds the bound"):
        attention_parity.check_attention(Faults("TF32 products"), shape=shape, gradients=False)


# The error of one number that is found for certain, relative to a number of median size.
LIMITS = {torch.float32: 1e-5, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}


@pytest.mark.slow
@every_dtype
def test_one_wrong_number_among_a_million(dtype):
    """In fp32 one that is off by 1e-5 of its size; in 16 bits by eight times the dtype's eps."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (normal((1, 16, n, 64), generator).to(dtype) for n in (1024, 16, 16))
    double = [x.double() for x in (q, k, v)]
    yardstick = numerics.simulate(lambda: attention_reference(*double, causal=False), weights=dtype)
    out = attention_reference(q, k, v, causal=False)
    assert out.numel() > 10**6
    numerics.check(out, yardstick)
    at = yardstick.oracle[0, 3].abs().median(dim=-1).indices[500].item()
    for sign in (1, -1):
        wrong = out.clone()
        wrong[0, 3, 500, at] = wrong[0, 3, 500, at].double() * (1 + sign * LIMITS[dtype])
        with pytest.raises(AssertionError, match=f"{500}, {at}.*exceeds the bound"):
            numerics.check(wrong, yardstick)


def test_one_percent_everywhere_is_found_in_the_mean_square():
    """Where each number errs by less than its own bound."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (normal((1, 8, 256, 64), generator).bfloat16() for _ in range(3))
    out = (attention_reference(q.float(), k.float(), v.float()) * 1.01).bfloat16()
    yardstick = numerics.simulate(lambda: attention_reference(*(x.double() for x in (q, k, v))), weights=q.dtype)
    assert numerics.compare(out, yardstick).largest < 1
    with pytest.raises(AssertionError, match="exceeds the bound"):
        numerics.check(out, yardstick)


def test_infinities_and_nan_must_be_the_oracles():
    oracle = torch.tensor([0.0, -torch.inf, torch.nan, 1e6], dtype=torch.float64)
    for right in (
        torch.tensor([0.0, -torch.inf, torch.nan, 1e6]),
        torch.tensor([0.0, -torch.inf, torch.nan, torch.inf]).half(),
    ):
        numerics.check(right, lambda: oracle)
        for i, wrong in enumerate((torch.inf, -6e4, 0.0, -torch.inf)):
            changed = right.clone()
            changed[i] = wrong
            with pytest.raises(AssertionError, match="infinities or NaN"):
                numerics.check(changed, lambda: oracle)


def test_shapes_and_structures_must_be_the_oracles():
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        numerics.check(torch.zeros(3), lambda: oracle)
    with pytest.raises(AssertionError, match="parts"):
        numerics.check({"out": torch.zeros(2, 3)}, lambda: {"out": oracle, "lse": oracle})
    with pytest.raises(TypeError, match="^reference: expected a function"):
        numerics.check(torch.zeros(2, 3), oracle)


def test_exact_results_pass_and_empty_ones_do():
    for x in (torch.zeros(3, 4), torch.zeros(2).double(), torch.ones(2), torch.tensor(2.0), torch.zeros(0, 3)):
        numerics.check(x, lambda: x.double())
    with pytest.raises(AssertionError, match="exceeds"):
        numerics.check(torch.full((3, 4), 1e-12), lambda: torch.zeros(3, 4, dtype=torch.float64))


def test_inference_mode_changes_no_yardstick():
    q, k, v = (x.double() for x in inputs(2, 4, 2, 5, 9, 16, torch.float32))

    def reference():
        scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1))
        return attention_reference(q, k, v), torch.nn.functional.linear(q, k[0, 0]), torch.matmul(scores.softmax(-1), v[0, 0])

    outside = numerics.simulate(reference)
    with torch.inference_mode():
        q, k, v = q.clone(), k.clone(), v.clone()
        inside = numerics.simulate(reference)
    for x, y in zip(outside, inside):
        assert torch.equal(x.oracle, y.oracle) and torch.equal(x.errors, y.errors)


@pytest.mark.parametrize("n", [2, 100, 5000])
def test_simulated_sums_err_as_sequential_sums_do(n):
    """Of terms of either sign, and of one."""
    for terms in (torch.randn(200, n), torch.rand(200, n)):
        sequential = torch.zeros(200)
        for column in terms.unbind(1):
            sequential = sequential + column
        error = (sequential.double() - terms.double().sum(1)).square().mean().sqrt()
        simulated = numerics.simulate(lambda: terms.double().sum(1), runs=8).errors.square().mean().sqrt()
        assert 0.4 < simulated / error < 2.5


def test_weights_are_rounded_whichever_function_computes_them():
    """PyTorch's scaled_dot_product_attention has a softmax of its own, for rows that see nothing."""
    q, k, v = torch.randn(3, 2, 4, 9, 16, dtype=torch.float64).unbind()
    functions = (
        lambda: attention_reference(q, k, v, causal=False),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    )
    ours, pytorchs = (numerics.simulate(f, weights=torch.bfloat16, runs=8).errors.square().mean().sqrt() for f in functions)
    assert 0.8 < pytorchs / ours < 1.25
    mask = torch.zeros(9, 9, dtype=torch.bool)
    seen = numerics.simulate(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    assert not seen.oracle.any() and not seen.errors.any()


def test_terms_below_the_smallest_normal_number_may_be_lost():
    """As matrix units lose them; but not others."""
    x, w = torch.full((3, 50), 2.0**-100), torch.full((50, 4), 2.0**-27)
    numerics.check(torch.zeros(3, 4), lambda: x.double() @ w.double())
    with pytest.raises(AssertionError, match="exceeds"):
        numerics.check(torch.zeros(3, 4), lambda: x.double() @ (1000 * w).double())


def test_the_yardstick_is_the_same_in_every_run():
    x, w = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    first, again = (numerics.simulate(lambda: (x @ w).softmax(-1)) for _ in range(2))
    assert torch.equal(first.errors, again.errors) and first.errors.any()


def test_random_inputs_are_the_same_in_every_run():
    """Dropout's mask is the same in the oracle and in simulated runs, and the caller's random numbers are left alone."""
    x = torch.ones(1000, dtype=torch.float64)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = numerics.simulate(lambda: torch.nn.functional.dropout(x, 0.5))
    assert found.errors.abs().max() < 1e-6 and torch.equal(torch.rand(3), expected)


def test_false_alarms_of_gaussian_errors():
    """Errors twice as large as simulated are allowed, and never exceed the bounds; three times as large do, of many numbers."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2,), (3, 5), (50, 40), (1000, 64)):
        errors = 1e-3 * torch.randn((3, *shape), generator=generator, dtype=torch.float64)
        yardstick = numerics.Yardstick(torch.zeros(shape, dtype=torch.float64), errors)
        draws = [1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(50)]
        assert all(numerics.compare(2 * x, yardstick, dtype=torch.float32).share <= 1 for x in draws)
        if math.prod(shape) > 10**4:
            assert all(numerics.compare(3 * x, yardstick, dtype=torch.float32).rms > 1 for x in draws)


@pytest.mark.parametrize("module", ["", ".numerics", ".attention_parity"])
def test_examples(module):
    found = doctest.testmod(importlib.import_module("fastgpt.testing" + module), extraglobs={"torch": torch})
    assert found.attempted and not found.failed


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_no_correct_kernel_exceeds_the_bounds_on_any_emulated_machine(seeds):
    """Every feature and dtype; among the machines are those with each lower CPU level."""
    command = [sys.executable, "-m", "fastgpt.testing", "--seeds", str(seeds), "--triton-seeds", "0"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
