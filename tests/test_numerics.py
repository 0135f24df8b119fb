"""The numerics helper must fail on faults that a kernel could have, or the parity tests prove nothing."""

from fastgpt.testing import numerics
import pytest
import torch

from fastgpt import attention_reference


def attend(q, k, v, **options):
    return attention_reference(q, k, v, return_lse=True, **options)


def mask_off_by_one(q, k, v):
    # Every query sees one key more: the last query of a longer sequence has nothing more to see.
    out, lse = attend(torch.cat([q, q[:, :, -1:]], 2), k, v)
    return out[:, :, 1:], lse[:, :, 1:]


def scale_off_by_one_percent(q, k, v):
    return attend(q, k, v, scale=1.01 * q.shape[-1] ** -0.5)


def swapped_head(q, k, v):
    return attend(q, k.flip(1), v.flip(1))


def one_nan(q, k, v):
    out, lse = attend(q, k, v)
    out[0, 0, 0, 0] = float("nan")
    return out, lse


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def inputs(request):
    torch.manual_seed(0)
    return [torch.randn(2, 2, 64, 32).to(request.param) for _ in range(3)]


def check(implementation, inputs):
    """As the parity tests do. In bfloat16 a scale that is 1% off drowns in the rounding of out, and lse shows it."""
    actual, oracle, low = implementation(*inputs), attend(*(x.double() for x in inputs)), attend(*inputs)
    numerics.check(actual[0], oracle[0], low[0], dtype=inputs[0].dtype, name="out")
    numerics.check(actual[1], oracle[1], low[1], dtype=torch.float32, name="lse")


def test_passes_what_is_correct(inputs):
    check(attend, inputs)


@pytest.mark.parametrize("fault", [mask_off_by_one, scale_off_by_one_percent, swapped_head, one_nan])
def test_fails_on_planted_faults(fault, inputs):
    with pytest.raises(AssertionError, match="exceeds the bound"):
        check(fault, inputs)


def test_fails_on_wrong_infinities():
    oracle = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="infinities"):
        numerics.check(torch.tensor([0.0, -1e30]), oracle, oracle.float(), dtype=torch.float32)


def test_fails_on_a_wrong_shape():
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        numerics.check(torch.zeros(3), oracle, oracle.float(), dtype=torch.float32)
