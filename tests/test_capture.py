"""Captured decode steps: the tokens and logits of steps that are not, and no capture where that would be wrong.

A GPU's way, a CUDA graph of the whole step, is gone here too, with a tape that plays the graph: tests/tape.py.
"""

import subprocess
import sys

import pytest
import torch
from models import random_ids, random_model
from tape import graph, graphs_on_cpu

from fastgpt import linear
from fastgpt.capture import Captured, Graphed, Recording
from fastgpt.model import MLP

pytestmark = pytest.mark.threads

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
    (recording,) = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, Recording))
    return recording.step


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


def other_forward(patch, model):
    forward = MLP.forward
    patch.setattr(MLP, "forward", lambda self, *arguments, **options: 2 * forward(self, *arguments, **options))


CHANGES = {
    "eps": lambda patch, model: patch.setattr(model.blocks[1].mlp_norm, "eps", 1.0),
    "kind of norm": lambda patch, model: patch.setattr(model.norm, "kind", "rms"),
    "activation": lambda patch, model: patch.setattr(model.blocks[0].mlp, "activation", "relu"),
    "scale of attention": lambda patch, model: patch.setitem(model.blocks[0].attention.options, "scale", 2.0),
    "forward of a class": other_forward,
}


@torch.inference_mode()
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change):
    def logits(changed: bool, recorded: bool):
        model = random_model()
        with pytest.MonkeyPatch.context() as patch:
            if not recorded:
                patch.setattr(Recording, "__call__", lambda self, x, tables=None: self.function(x, tables))
            step, token = model.decoding(model.new_cache(1)), torch.tensor([3])
            result = [step(token).clone() for _ in range(3)]
            if changed:
                CHANGES[change](patch, model)
            return result + [step(token).clone() for _ in range(3)]

    expected = logits(True, recorded=False)
    for actual, wanted in zip(logits(True, recorded=True), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert not torch.equal(expected[-1], logits(False, recorded=True)[-1])


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


def test_recording_loads_nothing_of_torch_compile():
    """Which takes longer than most generations."""
    program = (
        "import sys, torch, fastgpt; from fastgpt.cli import SHIPPED_MODEL; "
        "model = fastgpt.GPT.from_pretrained(SHIPPED_MODEL); before = set(sys.modules); "
        "model.generate(torch.tensor([[1, 2, 3]]), 4); print('torch._dynamo' in set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


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


# CUDA graphs

SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.95, "top_k": 40, "min_p": 0.001, "repetition_penalty": 1.2}
GRAPHED = [
    {},
    {"window": 9},
    {"cache": "sliding", "window": 9},
    {"cache": "paged", "page_size": 4},
    {"cache": "paged", "page_size": 4, "num_samples": 3},  # which copies pages on its way
    {"cache_dtype": torch.int8, "num_samples": 2},
]


@pytest.mark.parametrize("rules", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", GRAPHED, ids=str)
def test_a_graph_of_the_step_gives_the_same_tokens(options, rules):
    model = random_model()
    prompts = [random_ids(model, 1, length, seed=length)[0] for length in (5, 14, 9)]
    options = options | rules | {"eos": [7, 8], "return_logprobs": True}
    rows, logprobs = model.generate(prompts, 40, **options)
    with graphs_on_cpu() as graphs:
        again, again_logprobs = model.generate(prompts, 40, **options)
    assert len(graphs) == 1 and max(map(len, rows)) > 14 + 5
    assert all(map(torch.equal, again, rows)) and all(map(torch.equal, again_logprobs, logprobs))


@torch.inference_mode()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_graph_gives_the_same_logits(options):
    """Of tokens that are given, through truncation, and with passes of several tokens between."""
    model = random_model()
    ids = random_ids(model, 3, 40)
    eager, graphed = model.new_cache(3, **options), model.new_cache(3, **options)
    with graphs_on_cpu() as graphs:
        step = model.decoding(graphed)
        for cache in (eager, graphed):
            model(ids[:, :5], cache=cache, new=[5, 2, 4])
        for i in range(5, 40):
            if i == 20:
                assert torch.equal(model(ids[:, i - 3 : i], cache=graphed), model(ids[:, i - 3 : i], cache=eager))
            assert torch.equal(step(ids[:, i]), model(ids[:, i : i + 1], cache=eager)[:, -1])
            if i == 8 and "kind" not in options:
                for cache in (eager, graphed):
                    cache.truncate([3, 6, 0])
    assert len(graphs) == 1 and graphed.counts == eager.counts


@torch.inference_mode()
def test_a_graphs_host_still_checks():
    """What Python checks at every step: the capacity, the context and the batch."""
    model = random_model()
    with graphs_on_cpu():
        step = model.decoding(model.new_cache(2, 4))
        for _ in range(4):
            step(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"cache: expected at most 4 tokens \(its capacity\), got 4 stored \+ 1 new"):
            step(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="cache: expected one for a batch of 3, got one for 2"):
            step(torch.tensor([1, 2, 3]))


@torch.inference_mode()
def test_the_result_is_the_next_argument_and_stays_where_it_is():
    state = torch.zeros(1, dtype=torch.int64)

    def count(x):
        state.add_(1)
        return x + state

    with graphs_on_cpu():
        step, token, expected = Graphed(count), torch.tensor([10]), 10
        places = set()
        for i in range(1, 6):
            token, expected = step(token), expected + i
            places.add(token.data_ptr())
            assert token.item() == expected
        assert len(places) == 1
        assert step(torch.tensor([100])).item() == 106 and state.item() == 6


@torch.inference_mode()
def test_a_step_that_waits_for_the_device_is_not_captured():
    calls = []

    def waits(x):
        calls.append(1)
        return x * (2 if x.sum().item() > 0 else 3)

    with graphs_on_cpu():
        step = Graphed(waits)
        for x in (1, -1, 2):
            assert step(torch.tensor([x, x])).tolist() == [x * (2 if x > 0 else 3)] * 2
    assert "waits for the device" in step.refused and len(calls) == 4  # one of them while recording


@torch.inference_mode()
def test_the_tape_tells_what_a_graph_would_not_do():
    """State that Python replaces, in place of an update in place, is not seen by a graph, nor by the tape."""
    state = [torch.zeros(1)]

    def replaces():
        state[0] = state[0] + 1
        return state[0]

    play, result = graph(replaces, None)
    for _ in range(3):
        play()
    assert result.item() == 1

    kept = torch.zeros(1)
    play, result = graph(lambda: kept.add_(1) * 2, None)
    assert kept.item() == 0  # recording leaves nothing
    for _ in range(3):
        play()
    assert (kept.item(), result.item()) == (3, 6)
