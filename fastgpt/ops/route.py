"""Routing of a mixture of experts: contract, checks, reference, dispatch."""

import torch

from fastgpt.checks import (
    argument_error,
    require_choice,
    require_device,
    require_dtype,
    require_flag,
    require_integer,
    require_number,
    require_shape,
    require_tensor,
)
from fastgpt.ops.implementations import (
    INFERENCE_DTYPES,
    choose,
    explain_call,
    inference_unsupported_reason,
    triton_inference_unsupported_reason,
)
from fastgpt.ops.library import library, without_autograd
from fastgpt.ops.linear import DTYPES

SCORINGS = {"softmax": False, "sigmoid": True}
GROUP_SCORES = {"max": False, "top2": True}


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of each token in a mixture of experts, and their weights.

        scores  = softmax(logits) over all E experts, or sigmoid(logits)
        choice  = scores + selection_bias
        experts = the top_k experts with the largest choice, the best first; of equal ones, that with the smaller index
        weights = scores[experts] · scale, or scores[experts] / sum(scores[experts]) · scale                         normalize

    It is computed in fp32 (fp64 for fp64). GPT-OSS's softmax over the chosen logits is "softmax" with `normalize`.

    Args:
        logits: (..., E) fp16|bf16|fp32|fp64 of the router. A NaN makes weights of its token NaN; which experts it then gets is
            not specified, but they exist.
        top_k: experts of a token.
        scoring: "softmax" or "sigmoid".
        selection_bias: (E,) fp32 (fp64 for fp64), added for choosing only.
        num_groups: the number of equal groups that the experts form, each of consecutive ones.
        top_groups: the number of groups with the best score, from which experts are chosen.
        group_score: of a group: "max", its largest choice (DeepSeek-V2), or "top2", the sum of its two largest (DeepSeek-V3).
        normalize: divide the weights of a token by their sum.
        scale: factor on the weights, a finite number of their dtype.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call; see
            `fastgpt.explain`.

    Returns: (experts, weights): (..., top_k) int32, and (..., top_k) fp32 (fp64 for fp64). Weights are differentiable.
    Raises: TypeError (not a tensor or a number, dtype), ValueError (shape, device, range, scoring, group_score, impl):
        argument, expected, got.
    Source: Mixtral (arXiv 2401.04088), DeepSeek-V3 (arXiv 2412.19437).

    >>> experts, weights = route(torch.tensor([0.0, 3.0, 2.0, 1.0]), 2, normalize=True)
    >>> experts
    tensor([1, 2], dtype=torch.int32)
    """
    options = (top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    if not (type(top_k) is type(num_groups) is type(top_groups) is int and type(normalize) is bool and type(scale) is float):
        _check_route(logits, selection_bias, *options)  # PyTorch's dispatcher would accept True for a number
        top_k, num_groups, top_groups, scale = int(top_k), int(num_groups), int(top_groups), float(scale)
    try:
        # The kernels check the rest, in C++ in a fraction of the time.
        if (impl in (None, "cpp") and _route_cpp_refuses(logits, selection_bias) is None) or (
            impl in (None, "triton") and _route_triton_refuses(logits, selection_bias) is None
        ):
            groups = num_groups, top_groups, GROUP_SCORES[group_score]
            return _route(logits, top_k, SCORINGS[scoring], selection_bias, *groups, normalize, scale)
    except Exception as error:
        _check_route(logits, selection_bias, *options)  # raises the error that names the argument
        raise argument_error(error)
    _check_route(logits, selection_bias, *options)
    choose("route", ROUTE_IMPLEMENTATIONS, impl, logits, selection_bias)  # raises for an impl that cannot serve the call
    return _route_reference(logits, selection_bias, *options)


def route_reference(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference for `fastgpt.route` in plain PyTorch: on every device, differentiable. It takes the same arguments and
    ignores impl.

    Returns: (experts, weights): (..., top_k) int32, and (..., top_k) fp32 (fp64 for fp64).
    Raises: TypeError, ValueError as `fastgpt.route`.
    """
    options = (top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    _check_route(logits, selection_bias, *options)
    return _route_reference(logits, selection_bias, *options)


def _route_reference(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if SCORINGS[scoring] else logits.softmax(-1)  # (..., E)
    choice = scores.detach()
    if selection_bias is not None:
        choice = choice + selection_bias
    experts = _largest(choice, choice.shape[-1])
    if num_groups > top_groups:
        groups = choice.unflatten(-1, (num_groups, -1))  # (..., G, E / G)
        best = groups.topk(2, -1).values.sum(-1) if GROUP_SCORES[group_score] else groups.amax(-1)
        chosen = torch.zeros_like(best).scatter(-1, _largest(best, top_groups), 1.0)  # (..., G)
        of_experts = chosen.gather(-1, experts // groups.shape[-1])
        # A choice may be -inf: what is left out comes after it.
        experts = experts.gather(-1, _largest(of_experts, top_k))
    experts = experts[..., :top_k]
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts.int(), weights * scale


def _largest(x, k):
    """Indices of the k largest numbers of the last dimension, the largest first, and the first of equal ones."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _check_route(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale):
    require_tensor("logits", logits)
    require_dtype("logits", logits, DTYPES)
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., E), got a scalar")
    E = logits.shape[-1]
    require_choice("scoring", scoring, SCORINGS)
    if selection_bias is not None:
        require_tensor("selection_bias", selection_bias)
        require_shape("selection_bias", selection_bias, (E,), "(E,)")
        require_dtype("selection_bias", selection_bias, (torch.promote_types(logits.dtype, torch.float32),))
        require_device("selection_bias", selection_bias, logits.device)
    require_choice("group_score", group_score, GROUP_SCORES)
    require_integer("num_groups", num_groups, least=1)
    require_integer("top_groups", top_groups, least=1, most=num_groups)
    size = E // num_groups
    if E % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {E}, the number of experts, got {num_groups}")
    if num_groups > top_groups and GROUP_SCORES[group_score] and size < 2:
        raise ValueError(
            f"num_groups: expected groups of at least 2 experts for group_score='top2', got {num_groups} of {E} experts"
        )
    require_integer("top_k", top_k, least=1, most=top_groups * size)
    require_flag("normalize", normalize)
    largest = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).max
    require_number("scale", scale, least=-largest, most=largest)


def explain(
    logits: torch.Tensor, top_k: int, *, scoring: str = "softmax", selection_bias: torch.Tensor | None = None,
    num_groups: int = 1, top_groups: int = 1, group_score: str = "max", normalize: bool = False, scale: float = 1.0,
    impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    _check_route(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    return explain_call(ROUTE_IMPLEMENTATIONS, logits, selection_bias, impl=impl)


def _route_cpp_refuses(logits, selection_bias):
    return inference_unsupported_reason(logits, selection_bias)


def _route_triton_refuses(logits, selection_bias):
    return triton_inference_unsupported_reason(logits, selection_bias)


# In order of preference: the first that does not refuse serves the call.
ROUTE_IMPLEMENTATIONS = {
    "cpp": _route_cpp_refuses,
    "triton": _route_triton_refuses,
    "reference": lambda logits, selection_bias: None,
}

library.define(
    "route(Tensor logits, int top_k, bool sigmoid=False, Tensor? selection_bias=None, int num_groups=1, int top_groups=1, "
    "bool top2=False, bool normalize=False, float scale=1.0) -> (Tensor, Tensor)"
)

_route = without_autograd(torch.ops.fastgpt.route.default)


@torch.library.register_fake("fastgpt::route", lib=library)
def _route_fake(
    logits, top_k, sigmoid=False, selection_bias=None, num_groups=1, top_groups=1, top2=False, normalize=False, scale=1.0
):
    group_score = "top2" if top2 else "max"
    _check_route(logits, selection_bias, top_k, "softmax", num_groups, top_groups, group_score, normalize, scale)
    shape = (*logits.shape[:-1], top_k)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=dtype)


def _route_triton(
    logits, top_k, sigmoid=False, selection_bias=None, num_groups=1, top_groups=1, top2=False, normalize=False, scale=1.0
):
    group_score = "top2" if top2 else "max"
    _check_route(logits, selection_bias, top_k, "softmax", num_groups, top_groups, group_score, normalize, scale)
    require_dtype("logits", logits, INFERENCE_DTYPES)
    from fastgpt.kernels.moe import route  # Triton is imported only when a CUDA tensor needs it

    return route(logits, top_k, sigmoid, selection_bias, num_groups, top_groups, top2, normalize, scale)


library.impl("route", _route_triton, "CUDA")
