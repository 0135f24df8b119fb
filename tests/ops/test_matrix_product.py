"""The product of many rows: which one each CPU takes, oneDNN's with its derivatives, and the kernel's blocks of rows."""

import contextlib
import platform

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt import linear, linear_reference
from fastgpt.ops import matrix_product as module
from fastgpt.ops.matrix_product import KERNEL, ONEDNN, PYTORCH, matrix_product
from fastgpt.testing import numerics
from fastgpt.testing.linear_features import call_of, in_float64, split

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_FEATURES = {"amd": False, "avx512_bf16": False, "avx512_fp16": False}
needs_onednn = pytest.mark.skipif(module._onednn is None, reason="this PyTorch was built without oneDNN")


@pytest.mark.parametrize(
    "cpu, level, features, expected",
    [
        ("Zen 4 and 5", "avx512", {"amd", "avx512_bf16"}, (KERNEL, KERNEL, PYTORCH)),
        ("Zen 3", "avx2", {"amd"}, (KERNEL, KERNEL, KERNEL)),
        ("Cascade Lake", "avx512", set(), (PYTORCH, KERNEL, KERNEL)),
        ("Sapphire Rapids", "amx", {"avx512_bf16", "avx512_fp16"}, (PYTORCH, PYTORCH, PYTORCH)),
        ("its AVX2 kernels", "avx2", {"avx512_bf16", "avx512_fp16"}, (PYTORCH, PYTORCH, PYTORCH)),
        ("any other", "baseline", {"amd"}, (PYTORCH, PYTORCH, PYTORCH)),
        ("Arm", "neon", set(), (PYTORCH, PYTORCH, PYTORCH)),
    ],
)
def test_the_way_follows_from_the_cpu(cpu, level, features, expected):
    features = {name: name in features for name in NO_FEATURES}
    assert tuple(module._fastest(level, features, onednn=True).values()) == expected
    assert module._fastest(level, features, onednn=False)[torch.float32] == (KERNEL if cpu.startswith("Zen") else PYTORCH)
    onednn = ONEDNN if features["amd"] and level != "baseline" else PYTORCH
    with_derivatives = module._fastest(level, features, onednn=True, derivatives=True)
    assert tuple(with_derivatives.values()) == (onednn, PYTORCH, PYTORCH)


def test_this_cpu_has_the_features_that_decide():
    features = fastgpt._C.cpu_features()
    assert features.keys() == NO_FEATURES.keys()
    if platform.machine() not in ("x86_64", "AMD64"):  # under QEMU, /proc/cpuinfo tells of the machine that emulates
        assert features == NO_FEATURES
        return
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        facts = file.read()
        assert features["amd"] == ("AuthenticAMD" in facts)
        assert features["avx512_bf16"] == ("avx512_bf16" in facts) and features["avx512_fp16"] == ("avx512_fp16" in facts)


@pytest.fixture
def calls_of_onednn(monkeypatch):
    """Whatever the CPU, fp32 by oneDNN, and how often that was called."""
    calls, product = [], module._product
    monkeypatch.setitem(module.FASTEST, torch.float32, ONEDNN)
    monkeypatch.setitem(module._DIFFERENTIABLE, torch.float32, ONEDNN)
    monkeypatch.setattr(module, "_product", lambda *call: calls.append(call) or product(*call))
    return calls


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_onednn(transposed, calls_of_onednn, monkeypatch):
    """First and second ones, against those of F.linear in float64."""
    monkeypatch.setattr(module, "_TRANSPOSED", transposed)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 40, 24), (36, 24), (36,)))
    seeds = torch.randn(2, 40, 36), [torch.randn(shape) for shape in (x.shape, weight.shape, bias.shape)]

    def derivatives(product, dtype):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        dout = seeds[0].to(dtype).requires_grad_()
        out = product(*inputs)
        first = torch.autograd.grad(out, inputs, dout, create_graph=True)
        second = torch.autograd.grad(first, [*inputs[:2], dout], [seed.to(dtype) for seed in seeds[1]])
        return out, *first, *second

    actual = derivatives(matrix_product, torch.float32)
    assert len(calls_of_onednn) >= 1 + transposed
    yardsticks = numerics.simulate(lambda: dict(enumerate(derivatives(F.linear, torch.float64))))
    for name, tensor in enumerate(actual):
        assert numerics.compare(tensor, yardsticks[name]).share <= 1


@needs_onednn
@pytest.mark.parametrize("needed", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_only_gradients_that_are_needed(needed, calls_of_onednn, monkeypatch):
    """Of a sum: its derivatives are one number in memory."""
    monkeypatch.setattr(module, "_TRANSPOSED", True)
    inputs = [torch.randn(shape) for shape in ((40, 24), (36, 24), (36,))]
    wanted = [inputs[i].requires_grad_() for i in needed]
    actual = torch.autograd.grad(matrix_product(*inputs).sum(), wanted)

    def oracle():
        doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
        return torch.autograd.grad(F.linear(*doubles).sum(), [doubles[i] for i in needed])

    numerics.check(actual, oracle)
    assert len(calls_of_onednn) == 1 + (0 in needed)


@needs_onednn
def test_what_onednn_does_not_know_of_is_left_to_pytorch(calls_of_onednn):
    x, weight = torch.randn(40, 24), torch.randn(36, 24)
    assert torch.equal(torch.func.vmap(matrix_product, (0, None))(x.expand(2, 40, 24), weight)[0], F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert matrix_product(x, weight).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(matrix_product(dual, weight)).tangent
        assert torch.equal(tangent, F.linear(torch.ones_like(x), weight))
    with torch.backends.mkldnn.flags(enabled=False):
        matrix_product(x, weight)
    assert matrix_product(x, weight[:0]).shape == (40, 0)
    assert torch.equal(matrix_product(x[:2], weight), F.linear(x[:2], weight))
    for wrong in (weight[:, :23], weight.double(), weight[0, 0]):
        with pytest.raises((RuntimeError, TypeError)):
            matrix_product(x, wrong)
    assert not calls_of_onednn
    matrix_product(x, weight)
    assert len(calls_of_onednn) == 1


@needs_onednn
def test_any_strides(calls_of_onednn):
    """Of x and weight by oneDNN; a bias of another stride, which it ignores, is left to PyTorch."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 40, 48), (72, 48), (72,)))
    for some_x in (x[..., ::2], x[:, ::2, :24], x[0, :, 24:].t().contiguous().t(), x[:1, :, :24].expand(2, 40, 24)):
        for some_weight in (weight[:36, :24], weight[::2, ::2], weight.t()[:24, :36].t()):
            actual = matrix_product(some_x, some_weight, bias[:36].requires_grad_())
            numerics.check(actual.detach(), lambda: F.linear(*(x.detach().double() for x in (some_x, some_weight, bias[:36]))))
    assert len(calls_of_onednn) == 12
    for some_bias in (bias[::2], bias[:1].expand(36)):
        assert torch.equal(matrix_product(x, weight[:36], some_bias), F.linear(x, weight[:36], some_bias))
    assert len(calls_of_onednn) == 12


@needs_onednn
def test_results_may_be_changed_in_place(calls_of_onednn):
    for shape in ((40, 24), (2, 20, 24)):
        x, weight = torch.randn(shape), torch.randn(36, 24, requires_grad=True)
        actual = torch.autograd.grad(matrix_product(x, weight).relu_().sum(), weight)
        wide = weight.detach().double().requires_grad_()
        numerics.check(actual, lambda: torch.autograd.grad(F.linear(x.double(), wide).relu().sum(), wide))
    assert len(calls_of_onednn) == 2


@needs_onednn
def test_batched_backward_passes_and_tracing(calls_of_onednn, monkeypatch):
    monkeypatch.setattr(module, "_TRANSPOSED", True)
    x, weight = torch.randn(2, 20, 24, requires_grad=True), torch.randn(36, 24, requires_grad=True)
    seeds = torch.randn(3, 2, 20, 36)
    actual = torch.autograd.grad(matrix_product(x, weight), (x, weight), seeds, is_grads_batched=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    for i, seed in enumerate(seeds.double()):
        numerics.check(tuple(gradient[i] for gradient in actual), lambda: torch.autograd.grad(F.linear(*wide), wide, seed))
    traced = torch.jit.trace(matrix_product, (x.detach(), weight.detach()))
    numerics.check(traced(x, weight).detach(), lambda: F.linear(x.detach().double(), weight.detach().double()))
    with FlopCounterMode(display=False) as counter:
        matrix_product(x, weight)
    assert counter.get_total_flops() == 2 * 40 * 24 * 36


@needs_onednn
@pytest.mark.slow
def test_compiled_as_a_whole(calls_of_onednn):
    x, weight = torch.randn(40, 24), torch.randn(36, 24, requires_grad=True)
    actual = torch.compile(matrix_product, fullgraph=True, backend="eager")(x, weight)
    assert torch.equal(actual, F.linear(x, weight)) and not calls_of_onednn


@needs_onednn
def test_linear_takes_it_for_many_rows_with_gradients_and_without(calls_of_onednn):
    call = call_of("everything", 200, 40, 65, torch.float32)
    expected = in_float64(call)
    numerics.check(linear(**call), lambda: linear_reference(**expected))
    assert len(calls_of_onednn) == 1
    call["weight"].requires_grad_()
    numerics.check(linear(**call).detach(), lambda: linear_reference(**expected))
    assert len(calls_of_onednn) == 2
    linear_reference(**call), linear(**call, impl="reference")
    assert len(calls_of_onednn) == 2


@needs_onednn
def test_what_it_was_given_wrong_is_named(calls_of_onednn):
    x, weight = torch.randn(200, 24), torch.randn(36, 24)
    with pytest.raises(ValueError, match=r"weight: expected shape .*24"):
        linear(x, weight[:, :23].contiguous())
    with pytest.raises(TypeError, match="weight: expected"):
        linear(x, weight.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["everything", "everything, gated"])
@pytest.mark.parametrize("columns", [40, 515])
def test_the_kernel_takes_any_number_of_rows(columns, feature, dtype, monkeypatch):
    """A row has the same bits among any number above MAX_ROWS_CPU, in one block and in several."""
    monkeypatch.setitem(module.FASTEST, dtype, KERNEL)
    call = call_of(feature, 450, columns, 65, dtype)
    whole = linear(**call)
    numerics.check(whole, lambda: linear_reference(**in_float64(call)), arithmetic=dtype)
    assert torch.equal(whole, torch.cat([linear(**part) for part in split(call, [65, 300, 85])]))


def test_the_last_block_of_rows_is_about_as_long_as_the_others(monkeypatch):
    """A row has the same bits at the end of 20 blocks and one row more."""
    monkeypatch.setitem(module.FASTEST, torch.float32, KERNEL)
    x, weight = torch.randn(20 * 256 + 1, 520), torch.randn(48, 520)
    assert torch.equal(linear(x, weight)[-1], linear(x[-65:], weight)[-1])
