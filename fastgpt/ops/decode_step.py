"""A decode step before and after the blocks, in one launch each: embedding, positions, recording of the next token."""

import torch
import torch.nn.functional as F

from fastgpt.checks import require_device, require_dtype, require_number, require_shape, require_tensor
from fastgpt.ops.implementations import choose, triton_inference_unsupported_reason
from fastgpt.ops.library import library, without_autograd

IDS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def embed(
    ids: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Token embeddings plus position embeddings.

        out = weight[ids] · scale + position_weight[max(positions, 0)]

    Args:
        ids: (B, T) int64|int32. An id outside the table raises ValueError on CPU and gives NaN on CUDA.
        weight: (V, C) floating point.
        positions: (T,) or (B, T) int64|int32; negative for padding, whose embedding is meaningless.
        position_weight: (P, C), floating point, rounded to the dtype of weight; None: no position embeddings.
        scale: a number, rounded to the dtype of weight; the product is rounded, too.
        impl: "triton" (CUDA, one launch, the same bits) or "reference"; None picks the first that can serve the call.

    Returns: (B, T, C) in the dtype of weight. Calls that need gradients are served by the reference.
    Raises: TypeError (not a tensor, dtype), ValueError (shape, device, impl): argument, expected, got.
    """
    _check(ids, weight, positions, position_weight, scale)
    tensors = weight, ids, positions, position_weight
    if choose("embed", IMPLEMENTATIONS, impl, *tensors) == "triton":
        return _embed(ids, weight, positions, position_weight, None if scale is None else rounded(scale, weight.dtype))
    return embed_reference(ids, weight, positions, position_weight, scale=scale)


def embed_reference(
    ids: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """The reference for `embed` in plain PyTorch: on every device, differentiable. Same arguments; impl is ignored."""
    _check(ids, weight, positions, position_weight, scale)
    x = _rows(weight, ids, "ids")
    if scale is not None:
        x = x * rounded(scale, x.dtype)
    if position_weight is None:
        return x
    return x + _rows(position_weight, positions.clamp(min=0), "positions").to(x.dtype)


def _rows(table, index, name):
    try:
        return F.embedding(index, table)
    except (IndexError, RuntimeError):
        if index.numel() == 0:
            raise
        least, most = index.min().item(), index.max().item()
        if 0 <= least and most < len(table):
            raise
        raise ValueError(f"{name}: expected values from 0 to {len(table) - 1}, got {least} to {most}") from None


def _check(ids, weight, positions, position_weight, scale):
    require_tensor("weight", weight, 2)
    require_dtype("weight", weight, FLOATS)
    require_tensor("ids", ids, 2)
    require_dtype("ids", ids, IDS)
    require_device("ids", ids, weight.device)
    if position_weight is not None:
        require_tensor("positions", positions)
        require_dtype("positions", positions, IDS)
        shape = tuple(ids.shape if positions.dim() == 2 else ids.shape[1:])
        require_shape("positions", positions, shape, "(T,) or (B, T)")
        require_device("positions", positions, weight.device)
        require_tensor("position_weight", position_weight, 2)
        require_dtype("position_weight", position_weight, FLOATS)
        require_shape("position_weight", position_weight, (len(position_weight), weight.shape[1]), "(P, C)")
        require_device("position_weight", position_weight, weight.device)
    require_number("scale", scale, optional=True)


def rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype).item()


def advance(lengths: torch.Tensor, positions: torch.Tensor) -> None:
    """Advances each sequence by one token, in place: positions[b, 0] = lengths[b], then lengths += 1.

    Args: lengths (B,) and positions (B, 1), both int32 and contiguous.
    """
    if lengths.is_cpu or lengths.is_cuda and choose("advance", IMPLEMENTATIONS, None, lengths, positions) == "triton":
        _advance(lengths, positions)
    else:
        advance_reference(lengths, positions)


def advance_reference(lengths: torch.Tensor, positions: torch.Tensor) -> None:
    """The reference for `advance` in plain PyTorch, on every device."""
    positions.copy_(lengths.unsqueeze(1))
    lengths += 1


def record_token(
    token: torch.Tensor,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    extreme: torch.Tensor,
    step: torch.Tensor,
    ended: torch.Tensor | None = None,
    eos: torch.Tensor | None = None,
) -> None:
    """Records the next token of each sequence, in place.

        tokens[step, b] = token[b], or -1 if ended[b]
        extreme[b] = max(extreme[b], |score of token[b]|) unless ended[b]: finite as long as all scores are, NaN included
        ended[b] |= token[b] in eos,  step += 1

    Args:
        token: (B,) int64.
        scores: (B, V) floating point, or (B, 1): the score of the token itself.
        tokens: (steps, B) int64, contiguous; written.
        extreme: (B, 1) fp32 or fp64, contiguous; written.
        step: (1,) int64; written.
        ended: (B,) bool, contiguous; written. None if there is no end token.
        eos: (E,) int64, the end tokens, or None.
    """
    if token.is_cpu:
        _record_token(token, scores, tokens, extreme, step, ended, eos)
    elif token.is_cuda and scores.shape[1] == 1 and choose("record_token", IMPLEMENTATIONS, None, token) == "triton":
        _record_token(token, scores, tokens, extreme, step, ended, eos)
    else:
        record_token_reference(token, scores, tokens, extreme, step, ended, eos)


def record_token_reference(
    token: torch.Tensor,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    extreme: torch.Tensor,
    step: torch.Tensor,
    ended: torch.Tensor | None = None,
    eos: torch.Tensor | None = None,
) -> None:
    """The reference for `record_token` in plain PyTorch, on every device."""
    recorded, magnitude = token, (scores if scores.shape[1] == 1 else scores.gather(1, token.unsqueeze(1))).abs()
    if ended is not None:
        recorded, magnitude = torch.where(ended, -1, token), magnitude.masked_fill(ended.unsqueeze(1), 0)
        ended |= (token.unsqueeze(1) == eos).any(-1)
    tokens.index_copy_(0, step, recorded.unsqueeze(0))
    torch.maximum(extreme, magnitude, out=extreme)
    step += 1


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"triton": triton_inference_unsupported_reason, "reference": lambda *call: None}

library.define(
    "embed(Tensor ids, Tensor weight, Tensor? positions=None, Tensor? position_weight=None, float? scale=None) -> Tensor",
    "fastgpt.ops.decode_step.embed",
)
library.define("advance_(Tensor(a!) lengths, Tensor(b!) positions) -> ()", "fastgpt.ops.decode_step.advance")
library.define(
    "record_token_(Tensor token, Tensor scores, Tensor(a!) tokens, Tensor(b!) extreme, Tensor(c!) step, Tensor(d!)? ended=None, "
    "Tensor? eos=None) -> ()",
    "fastgpt.ops.decode_step.record_token",
)
_embed = without_autograd(torch.ops.fastgpt.embed.default)
_advance = without_autograd(torch.ops.fastgpt.advance_.default)
_record_token = without_autograd(torch.ops.fastgpt.record_token_.default)


@torch.library.register_fake("fastgpt::embed", lib=library)
def _embed_fake(ids, weight, positions=None, position_weight=None, scale=None):
    _check(ids, weight, positions, position_weight, scale)
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.register_fake("fastgpt::advance_", lib=library)
def _advance_fake(lengths, positions):
    pass


@torch.library.register_fake("fastgpt::record_token_", lib=library)
def _record_token_fake(token, scores, tokens, extreme, step, ended=None, eos=None):
    pass


def _embed_triton(ids, weight, positions=None, position_weight=None, scale=None):
    _check(ids, weight, positions, position_weight, scale)
    from fastgpt.kernels.decode_step import embed  # Triton is imported only when a CUDA tensor needs it

    return embed(ids, weight, positions, position_weight, scale)


def _advance_triton(lengths, positions):
    require_tensor("lengths", lengths, 1)
    for name, x, shape, meaning in (
        ("lengths", lengths, (len(lengths),), "(B,)"), ("positions", positions, (len(lengths), 1), "(B, 1)"),
    ):  # fmt: skip
        _require_contiguous(name, x, (torch.int32,), shape, meaning, lengths.device)
    from fastgpt.kernels.decode_step import advance

    advance(lengths, positions)


def _record_token_triton(token, scores, tokens, extreme, step, ended=None, eos=None):
    require_tensor("token", token, 1)
    require_tensor("tokens", tokens, 2)
    B, device = len(token), token.device
    if (ended is None) != (eos is None):
        raise ValueError("ended, eos: expected both or none, got one")
    for name, x, dtypes, shape, meaning in (
        ("token", token, (torch.int64,), (B,), "(B,)"), ("scores", scores, FLOATS, (B, 1), "(B, 1)"),
        ("tokens", tokens, (torch.int64,), (len(tokens), B), "(steps, B)"),
        ("extreme", extreme, (torch.float32, torch.float64), (B, 1), "(B, 1)"),
        ("step", step, (torch.int64,), (1,), "(1,)"), ("ended", ended, (torch.bool,), (B,), "(B,)"),
    ):  # fmt: skip
        if x is not None:
            _require_contiguous(name, x, dtypes, shape, meaning, device)
    if eos is not None:
        require_tensor("eos", eos, 1)
        _require_contiguous("eos", eos, (torch.int64,), (len(eos),), "(E,)", device)
    from fastgpt.kernels.decode_step import record_token

    record_token(token, scores, tokens, extreme, step, ended, eos)


def _require_contiguous(name, x, dtypes, shape, meaning, device):
    """Checks a tensor that a kernel indexes without strides."""
    require_tensor(name, x)
    require_dtype(name, x, dtypes)
    require_shape(name, x, shape, meaning)
    require_device(name, x, device)
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")


library.impl("embed", _embed_triton, "CUDA")
library.impl("advance_", _advance_triton, "CUDA")
library.impl("record_token_", _record_token_triton, "CUDA")
