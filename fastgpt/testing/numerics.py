"""The numerics contract: the one place where a tolerance is decided.

The oracle is the reference in float64 on the same, already rounded inputs. An implementation in dtype d may err by
at most k times what the reference errs when run in d, plus one unit of eps(d) at the oracle's scale.
"""

import torch

FORWARD, BACKWARD = 2, 3


def share_of_bound(actual, oracle, low_precision, *, dtype, k=FORWARD) -> tuple[float, float]:
    """The worst error of one tensor as a share of what the contract allows, and that error. Arguments: `check`."""
    actual, oracle, low_precision = (tensor.detach().cpu().double() for tensor in (actual, oracle, low_precision))
    finite = ~oracle.isinf()
    if not torch.equal(actual[~finite], oracle[~finite]):
        return torch.inf, torch.inf
    actual, oracle, low_precision = actual[finite], oracle[finite], low_precision[finite]
    if oracle.numel() == 0:
        return 0.0, 0.0
    error = (actual - oracle).abs().max().item()
    bound = k * (low_precision - oracle).abs().max().item() + torch.finfo(dtype).eps * oracle.abs().max().item()
    return error / max(bound, 1e-300), error


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
    share, error = share_of_bound(actual, oracle, low_precision, dtype=dtype, k=k)
    assert share != torch.inf, f"{name}: infinities differ from the oracle's"
    # Written so that a NaN anywhere fails.
    assert share <= 1, f"{name}: error {error:.3e} exceeds the bound {error / share:.3e} ({share:.2f}x)"
