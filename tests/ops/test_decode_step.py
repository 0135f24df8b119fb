"""What a decode step does before and after the blocks, against the references and the modules of the decoder.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, passed, runs_kernel, starts_the_interpreter  # noqa: E402
from models import random_ids, random_model  # noqa: E402

from fastgpt.kernels import decode_step as kernel  # noqa: E402
from fastgpt.ops.decode_step import (  # noqa: E402
    advance,
    advance_reference,
    embed,
    embed_reference,
    record_token,
    record_token_reference,
    rounded,
)

pytestmark = pytest.mark.threads


def tables(dtype, C=70):
    return torch.randn(50, C, device=DEVICE).to(dtype), torch.randn(9, C, device=DEVICE).to(dtype)


@runs_kernel
@pytest.mark.parametrize("scale", [None, 7.3])
@pytest.mark.parametrize("kind", [None, "learned", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_is_exact(dtype, kind, scale):
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter cuts bf16 off, instead of rounding")
    weight, table = tables(dtype, 1100)
    ids = torch.randint(50, (3, 4), device=DEVICE)
    positions = torch.tensor([[0, 1, 2, 8], [-1, -1, 3, 4], [5, 6, 7, 8]], dtype=torch.int32, device=DEVICE)
    table = None if kind is None else table.float() if kind == "fp32" else table
    for places in (positions, positions[0].long()):
        actual = kernel.embed(ids, weight, places, table, None if scale is None else rounded(scale, dtype))
        assert torch.equal(actual, embed_reference(ids, weight, places, table, scale=scale))


@runs_kernel
def test_unknown_tokens_are_nan():
    weight, _ = tables(torch.float32)
    actual = kernel.embed(torch.tensor([[3, -1, 50, 2**40]], device=DEVICE), weight)
    assert torch.equal(actual[0, 0], weight[3]) and actual[0, 1:].isnan().all()


@runs_kernel
@pytest.mark.parametrize("B", [1, 200])
def test_the_kernel_advances(B):
    lengths = torch.arange(B, dtype=torch.int32, device=DEVICE)
    positions = torch.full_like(lengths, -7).unsqueeze(1)
    for step in range(2):
        kernel.advance(lengths, positions)
        assert positions[:, 0].tolist() == [b + step for b in range(B)]
        assert lengths.tolist() == [b + step + 1 for b in range(B)]


@pytest.mark.parametrize("function", [advance, advance_reference])
def test_advance(function):
    lengths, positions = torch.tensor([3, 0], dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    function(lengths, positions)
    assert lengths.tolist() == [4, 1] and positions.tolist() == [[3], [0]]


def random_recording(B, device, eos):
    """Arguments of record_token: the third of five steps."""
    generator = torch.Generator().manual_seed(0)
    ended = torch.randint(2, (B,), generator=generator).bool() if eos else None
    largest = torch.tensor([3e38, float("nan"), float("inf"), -float("inf"), -3.0]).repeat(B)[:B, None]
    tensors = [
        torch.randint(5, (B,), generator=generator), largest, torch.full((5, B), -7), torch.ones(B, 1), torch.tensor([2]),
        ended, torch.tensor([3, 1]) if eos else None,
    ]  # fmt: skip
    return [x if x is None else x.to(device) for x in tensors]


@runs_kernel
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("B", [1, 7, 600])
def test_the_kernel_records_tokens_as_the_reference(B, eos):
    actual, expected = random_recording(B, DEVICE, eos), random_recording(B, "cpu", eos)
    for arguments, function in ((actual, kernel.record_token), (expected, record_token_reference)):
        function(*arguments)
        function(*arguments)
    assert all(a is e is None or torch.equal(a.cpu().nan_to_num(7), e.nan_to_num(7)) for a, e in zip(actual, expected))


@pytest.mark.parametrize("function", [record_token, record_token_reference])
def test_record_token(function):
    token, largest, tokens, extreme, step, ended, eos = random_recording(30, "cpu", True)
    before = ended.clone()
    function(token, largest, tokens, extreme, step, ended, eos)
    assert tokens[2].tolist() == torch.where(before, -1, token).tolist() and (tokens[[0, 1, 3, 4]] == -7).all()
    assert ended.tolist() == [old or new in (3, 1) for old, new in zip(before.tolist(), token.tolist())] and step.item() == 3
    expected = torch.where(before[:, None], 1.0, largest.abs())
    assert torch.equal(extreme.nan_to_num(7), expected.nan_to_num(7))
    function(token, -torch.ones(30, 1), tokens, extreme, step, ended, eos)
    assert torch.equal(extreme.nan_to_num(7), expected.nan_to_num(7))  # what was not finite stays, and the largest


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("extreme_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_record_token_finds_the_scores_of_tokens(dtype, extreme_dtype, eos):
    """As the reference does, whatever the layout of what is read."""
    both = [random_recording(9, "cpu", eos) for _ in range(2)]
    for arguments in both:
        arguments[3] = arguments[3].to(extreme_dtype)
    scores = (torch.randn(5, 18) * 100).to(dtype).t()[::2]
    scores[3, 1], scores[4, 2], scores[8] = float("nan"), float("inf"), -float("inf")
    for (token, _, tokens, extreme, step, ended, ends), function in zip(both, (record_token, record_token_reference)):
        apart = token.repeat_interleave(2)[::2]
        function(apart, scores, tokens, extreme, step, ended, ends)
        function((apart + 1) % 5, scores, tokens, extreme, step, ended, ends)
    for a, e in zip(*both):
        assert a is e is None or torch.equal(a.nan_to_num(7), e.nan_to_num(7))


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.tensor([9, 0, 0]), "token: expected numbers from 0 to 4, got 9"),
        (0, torch.zeros(3), "token: unexpected dtype"),
        (1, torch.zeros(3, 5, dtype=torch.int64), "scores: unexpected dtype"),
        (1, torch.zeros(2, 5), "scores: unexpected shape"),
        (2, torch.zeros(2, 3, dtype=torch.int64), "step: expected a number from 0 to 1, got 2"),
        (3, torch.zeros(3), "extreme: unexpected shape"),
        (4, torch.tensor([-1]), "step: expected a number from 0 to 4, got -1"),
        (5, None, "ended, eos: expected both or none"),
        (5, torch.zeros(6, dtype=torch.bool)[::2], "ended: expected a contiguous tensor"),
        (6, torch.zeros(2), "eos: unexpected dtype"),
    ],
)  # fmt: skip
def test_record_token_writes_nothing_where_arguments_are_wrong(position, value, message):
    arguments = random_recording(3, "cpu", True)
    arguments[1] = torch.zeros(3, 5)
    arguments[position] = value
    before = [x if x is None else x.clone() for x in arguments]
    with pytest.raises(RuntimeError, match=message):
        record_token(*arguments)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(arguments, before))


@pytest.mark.parametrize("options", [{}, {"position": "sinusoidal"}, {"position": None, "embedding_scale": 5.3}], ids=str)
def test_a_reserved_step_embeds_as_any_other(options):
    model = random_model(**options)
    ids, caches = random_ids(model, 2, 4), [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        model(ids[:, :3], cache=cache)
    caches[1].reserve(1)
    tables = model.position_tables(ids, caches[1])
    assert torch.equal(model.embed(ids[:, 3:], caches[0]), model.embed_reserved(ids[:, 3:], caches[1], tables))
    assert torch.equal(caches[0].lengths, caches[1].lengths) and torch.equal(caches[0].positions, caches[1].positions)


ids, weight = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"ids": ids[0]}, ValueError, r"ids: expected 2 dimensions, got shape \(3,\)"),
        ({"ids": ids.float()}, TypeError, "ids: expected dtype torch.int64 or torch.int32, got torch.float32"),
        ({"ids": ids.to("meta")}, ValueError, "ids: expected device cpu, got meta"),
        ({"position_weight": weight}, TypeError, "positions: expected a torch.Tensor, got NoneType"),
        ({"position_weight": weight, "positions": ids[:, :2]}, ValueError, r"positions: expected shape \(2, 3\)"),
        ({"position_weight": weight[:, 1:], "positions": ids}, ValueError, r"position_weight: expected shape \(5, 8\)"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot serve this call: it runs on CUDA tensors"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        embed(**{"ids": ids, "weight": weight} | change)


@pytest.mark.gpu
def test_opcheck():
    weight, table = tables(torch.bfloat16)
    ids = torch.randint(50, (3, 4), device=DEVICE)
    torch.library.opcheck(torch.ops.fastgpt.embed.default, (ids, weight, ids[0] % 9, table, 2.0))
    lengths = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.fastgpt.advance_.default, (lengths, lengths.clone().unsqueeze(1)))
    torch.library.opcheck(torch.ops.fastgpt.record_token_.default, tuple(random_recording(3, DEVICE, True)))


@pytest.mark.slow
@starts_the_interpreter
def test_under_the_interpreter():
    assert passed(__file__) >= 19
