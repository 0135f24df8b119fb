"""Invalid calls, for fuzz_operations.py: one argument of a valid call is replaced. What every operation must refuse is in BAD."""

import inspect
from pathlib import Path

import numpy as np
import torch
from fuzz_valid_calls import FLOATS, NOT_FLOATS


class Stranger:
    """No tensor, number or string."""

    def __repr__(self):
        return "Stranger()"


def meta(x):
    return x.to("meta")


def quantized_tensor(x):
    return torch.quantize_per_tensor(x.detach().float().nan_to_num(), 0.1, 0, torch.qint8)


def sparse(x):
    return torch.zeros(x.shape).to_sparse()


def nested(x):
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged)


def without_storage(x):
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def wider(x):
    return torch.cat([x, x[..., :1]], -1) if x.dim() and x.shape[-1] else x.unsqueeze(0)


def longer(x):
    return torch.cat([x, x[:1]]) if x.dim() and x.shape[0] else x.unsqueeze(-1)


def subclass(x):
    return torch.nn.Parameter(x, requires_grad=False) if x.is_floating_point() else x


def overlapping(x):
    return x.new_zeros(sum(x.shape) + 1).as_strided(x.shape, [1] * x.dim()) if x.numel() else x


TENSORS = [
    *((lambda x, dtype=dtype: x.detach().float().nan_to_num().to(dtype)) for dtype in (*NOT_FLOATS, torch.float64, torch.int32)),
    meta, quantized_tensor, sparse, nested, without_storage, wider, longer, subclass, overlapping,
    lambda x: x.flatten()[0] if x.numel() else x.new_zeros(()), lambda x: x.unsqueeze(0), lambda x: x[:0] if x.dim() else x,
    lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, lambda x: x[0] if x.dim() and len(x) else x,
    lambda x: x.new_zeros(1).expand(x.shape), lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    lambda x: x.neg() if x.dtype != torch.bool else x, lambda x: x + 1 if x.dtype != torch.bool else ~x,
    lambda x: x.detach().float().numpy(), lambda x: x.tolist() if x.numel() < 100 else [1.0], lambda x: None,
    lambda x: "x", lambda x: 1, lambda x: Stranger(), lambda x: torch.complex(x.float(), x.float()).conj(),
]  # fmt: skip
OTHERS = [
    "x", "", None, [], [1], {}, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e-46, 1e-30, 0.5, 1.0, 1e39, 1e300, -1e300,
    float("nan"), float("inf"), -float("inf"), 1j, b"1", Stranger(), np.float32(1), np.int64(2), np.array(1.0), np.ones(3),
    np.bool_(True), torch.tensor(1.0), torch.tensor(2), torch.ones(3), torch.tensor(True), int, Path("x"),
]  # fmt: skip
BAD = {meta, quantized_tensor, sparse, nested}  # of those beside ordinary tensors


def aliased(draw, call):
    """The cache of an update shares memory with another tensor."""
    name = draw.choice(["k", "v", "v_cache", "k_cache"])
    k_cache = call["k_cache"]
    if name == "k_cache":
        return call | {name: k_cache[:1].expand_as(k_cache)}, len(k_cache) < 2
    if name == "v_cache":
        return call | {name: k_cache}, False
    if call[name].dtype != k_cache.dtype or call[name].shape[2] > k_cache.shape[2] or len(k_cache) != len(call[name]):
        return call, True
    return call | {name: k_cache[:, :, : call[name].shape[2]]}, False


def invalid(draw, operation, call):
    """(call with one argument that is something else, whether it must be refused, whether the reference may be asked)"""
    if (
        "k_cache" in call
        and draw.chance(0.1)
        and call["k_cache"].dtype in FLOATS
        and call["k_cache"].numel()
        and call["k"].numel()
    ):
        changed, harmless = aliased(draw, call)
        return changed, not harmless, harmless
    name = draw.choice([name for name in inspect.signature(operation).parameters if name != "impl"])
    if name in call and isinstance(call[name], torch.Tensor):
        change = draw.choice(TENSORS)
        try:
            changed = change(call[name])
        except RuntimeError:  # PyTorch cannot do this to such a tensor
            change, changed = None, None
        if change is without_storage:
            lost = isinstance(changed, torch.Tensor) and changed.numel() > 0
            return call | {name: changed}, lost, not lost
        return call | {name: changed}, change in BAD, True
    return call | {name: draw.choice(OTHERS)}, False, True
