"""Captured decode steps: the tokens and logits of steps that are not, and no capture where that would be wrong."""

import pytest
import torch
from models import random_ids, random_model

from fastgpt import linear
from fastgpt.capture import Captured

KINDS = [
    {},
    {"window": 9},
    {"kind": "sliding", "window": 9},
    {"kind": "paged", "page_size": 4},
    {"cache_dtype": torch.int8},
    {"kind": "paged", "page_size": 4, "cache_dtype": torch.float8_e4m3fn, "window": 7},
]


@torch.inference_mode()
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_is_the_same_bits(options, dtype):
    """Through a ring that is overwritten, pages that are taken on the way, and a sequence that begins again."""
    model = random_model().to(dtype)
    ids = random_ids(model, 3, 40)
    eager, captured = model.new_cache(3, **options), model.new_cache(3, **options)
    for cache in (eager, captured):
        model(ids[:, :5], cache=cache, new=[5, 2, 4])
    step = model.decoding(captured)
    for i in range(5, 40):
        expected = model.logits(model.hidden(ids[:, i : i + 1], eager)[:, -1])
        assert torch.equal(step(ids[:, i]), expected)
        if i == 8 and "kind" not in options:
            for cache in (eager, captured):
                cache.truncate([3, 6, 0])


def captured(step):
    """The Captured within what `decoding` returned, or None."""
    return next((cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, Captured)), None)


@torch.inference_mode()
def test_it_is_captured_where_it_can_be():
    model, few, many = random_model(), random_ids(random_model(), 32, 1)[:, 0], random_ids(random_model(), 33, 1)[:, 0]
    step = model.decoding(model.new_cache(32))
    step(few)
    assert captured(step).refused is None and len(captured(step).plan) == 2 * 6 + 1
    step = model.decoding(model.new_cache(33))  # more rows than the linear kernel takes
    step(many)
    assert "is not one of fastgpt's operations" in captured(step).refused


@torch.inference_mode()
def test_hooks_are_called_at_every_step():
    model, calls = random_model(), []
    hook = model.blocks[1].mlp.register_forward_hook(lambda *arguments: calls.append(1))
    model.generate(random_ids(model, 1, 4), 5)
    assert len(calls) == 5
    hook.remove()
    model.generate(random_ids(model, 1, 4), 5)
    assert len(calls) == 5


@torch.inference_mode()
def test_a_function_of_other_operations_is_called_each_time():
    weight = torch.randn(8, 8)
    function = Captured(lambda x: linear(x, weight).relu())
    for _ in range(3):
        x = torch.randn(1, 8)
        assert torch.equal(function(x), linear(x, weight).relu())
    assert function.refused == "aten.relu.default is not one of fastgpt's operations"


@torch.inference_mode()
def test_a_copy_inside_an_operation_is_not_captured():
    """A tensor that is not contiguous is copied at each call; the copy of the first must not be read again."""
    weight, bias = torch.randn(8, 8), torch.randn(16)[::2]
    function = Captured(lambda x: linear(x, weight, bias))
    for _ in range(3):
        x = torch.randn(1, 8)
        bias.mul_(2)
        assert torch.equal(function(x), linear(x, weight, bias))
    assert function.refused == "an operation of fastgpt's cannot be recorded"


@torch.inference_mode()
def test_an_error_while_recording_ends_it():
    def fails(x):
        linear(x, torch.eye(8))
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            Captured(fails)(torch.randn(1, 8))
    assert Captured(lambda x: linear(x, torch.eye(8)))(torch.randn(1, 8)).shape == (1, 8)


@torch.inference_mode()
def test_two_captured_generations_side_by_side():
    model = random_model()
    ids = random_ids(model, 2, 6)
    alone = [model.generate(row[None], 20)[0] for row in ids]
    caches = [model.new_cache(1) for _ in ids]
    streams = [model.decoding(cache) for cache in caches]
    tokens = []
    for row, cache in zip(ids, caches):
        tokens.append([model(row[None], cache=cache)[0, -1].argmax()])
    for _ in range(19):
        for step, mine in zip(streams, tokens):
            mine.append(step(mine[-1][None])[0].argmax())
    for row, mine, expected in zip(ids, tokens, alone):
        assert torch.equal(torch.cat([row, torch.stack(mine)]), expected)
