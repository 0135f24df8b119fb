"""Dimensions that all heads share, before each head's own: the same bits by every implementation."""

import pytest
import torch

from fastgpt.ops.prepend_shared import prepend_shared, prepend_shared_reference


def arguments(B=2, T=3, H=4, R=5, D=7, dtype=torch.float32):
    return torch.randn(B, T, R).to(dtype), torch.randn(B, T, H, D).to(dtype)


def expected(shared, x):
    out = torch.empty(*x.shape[:3], shared.shape[2] + x.shape[3], dtype=x.dtype)
    for h in range(x.shape[2]):
        out[:, :, h, : shared.shape[2]], out[:, :, h, shared.shape[2] :] = shared, x[:, :, h]
    return out


@pytest.mark.parametrize("impl", [None, "cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_implementation(dtype, impl):
    for sizes in ({}, {"B": 1, "T": 1}, {"H": 1, "R": 64, "D": 512}, {"T": 40, "H": 16, "R": 64, "D": 128}, {"B": 0}, {"D": 0}):
        shared, x = arguments(**sizes, dtype=dtype)
        actual = prepend_shared(shared, x, impl=impl)
        assert torch.equal(actual, expected(shared, x)) and actual.is_contiguous()


@pytest.mark.parametrize("impl", [None, "cpp", "reference"])
def test_views(impl):
    """Parts of the rows of projections, as attention has them, and heads before tokens."""
    y, kv = torch.randn(2, 3, 30), torch.randn(2, 4, 3, 20).transpose(1, 2)
    shared, x = y[..., 22:], kv[..., :11]
    assert torch.equal(prepend_shared(shared, x, impl=impl), expected(shared, x))
    shared, x = y[::2, 1:, 3:4], kv[::2, 1:, :1]
    assert torch.equal(prepend_shared(shared, x, impl=impl), expected(shared, x))


def test_other_layouts_and_float64_go_to_the_reference():
    shared, x = arguments()
    for call in ((shared.double(), x.double()), (shared.mT.contiguous().mT, x)):
        assert torch.equal(prepend_shared(*call), expected(*call))
        with pytest.raises(ValueError, match="impl='cpp' cannot serve this call: it takes"):
            prepend_shared(*call, impl="cpp")


def test_gradients():
    shared, x = (y.double().requires_grad_() for y in arguments())
    assert torch.autograd.gradcheck(prepend_shared, (shared, x))


def test_the_registered_operation():
    torch.library.opcheck(torch.ops.fastgpt.prepend_shared.default, arguments())
    compiled = torch.compile(prepend_shared, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments()) * 0, expected(*arguments()) * 0)


@pytest.mark.parametrize("function", [prepend_shared, prepend_shared_reference])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda shared, x: (shared[0], x), ValueError, "shared: expected .*3"),
        (lambda shared, x: (shared, x[0]), ValueError, "x: expected .*4"),
        (lambda shared, x: (shared[:, :2], x), ValueError, r"shared: expected shape \(2, 3, 5\) .*, got \(2, 2, 5\)"),
        (lambda shared, x: (shared.half(), x), TypeError, "shared: expected"),
        (lambda shared, x: (shared, x.int()), TypeError, "x: expected"),
        (lambda shared, x: (None, x), TypeError, "shared: expected"),
    ],
)
def test_errors(function, change, error, message):
    with pytest.raises(error, match=message):
        function(*change(*arguments()))
