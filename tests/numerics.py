"""The numerics contract: the one place where a tolerance is decided.

The oracle is the reference in float64 on the same, already rounded inputs. An implementation in dtype d may err by
at most k times what the reference errs when run in d, plus one unit of eps(d) at the oracle's scale.
"""

import torch

FORWARD, BACKWARD = 2, 3


def check(actual, oracle, low_precision, *, dtype, k=FORWARD, name="result"):
    """Asserts the contract for one tensor.

    Args:
        actual: what the implementation returned.
        oracle: the reference in float64 on the same inputs.
        low_precision: the reference in the implementation's own dtype.
        dtype: the dtype whose eps counts, that of the inputs.
        k: FORWARD or BACKWARD.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}"
    actual, oracle, low_precision = (tensor.detach().cpu().double() for tensor in (actual, oracle, low_precision))
    infinite = oracle.isinf()
    assert torch.equal(actual[infinite], oracle[infinite]), f"{name}: infinities differ from the oracle's"
    actual, oracle, low_precision = actual[~infinite], oracle[~infinite], low_precision[~infinite]
    if oracle.numel() == 0:
        return
    eps = torch.finfo(dtype).eps
    error = (actual - oracle).abs().max().item()
    bound = k * (low_precision - oracle).abs().max().item() + eps * oracle.abs().max().item()
    # Written so that a NaN anywhere fails.
    assert error <= bound, f"{name}: error {error:.3e} exceeds the bound {bound:.3e} ({error / max(bound, 1e-300):.2f}x)"
