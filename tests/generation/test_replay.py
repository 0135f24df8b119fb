"""CpuReplay decode steps: the tokens and logits of steps that are not, and no capture where that would be wrong.

A GPU's way, a CUDA graph of the whole step, is gone here too, with a tape that plays the graph: tests/tape.py.
"""

import gc
import re
import subprocess
import sys
import weakref
from unittest import mock

import pytest
import torch
from cuda_stub import stubbed_cuda
from models import random_ids, random_model
from tape import graph, graphs_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef

import fastgpt
from fastgpt import GPT, decoding, generate, linear
from fastgpt.generation.generate import stream
from fastgpt.generation.replay import CpuReplay, CudaGraphReplay, Recording
from fastgpt.generation.request import sessions
from fastgpt.model.layers import MLP
from fastgpt.model.rope import Rope, Tables
from fastgpt.ops.linear import MAX_ROWS_CPU
from fastgpt.ops.matrix_product import FASTEST, KERNEL, PYTORCH

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
    step = decoding(model, captured)
    for i in range(5, 40):
        expected = model.logits(model.hidden(ids[:, i : i + 1], eager)[:, -1])
        assert torch.equal(step(ids[:, i]), expected)
        if i == 8 and "kind" not in options:
            for cache in (eager, captured):
                cache.truncate([3, 6, 0])


def captured(step):
    """The CpuReplay within what `decoding` returned, or None."""
    (recording,) = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, Recording))
    return recording.step


@torch.inference_mode()
def test_steps_are_captured_where_kernels_support_them(monkeypatch):
    model = random_model()
    few, many = (random_ids(model, rows, 1)[:, 0] for rows in (MAX_ROWS_CPU, MAX_ROWS_CPU + 1))
    step = decoding(model, model.new_cache(len(few)))
    step(few)
    assert captured(step).refused is None and len(captured(step).plan) == 2 * 6 + 1
    monkeypatch.setitem(FASTEST, torch.float32, PYTORCH)
    step = decoding(model, model.new_cache(len(many)))  # more rows than the linear kernel takes
    step(many)
    assert "is not one of fastgpt's operations" in captured(step).refused
    reasons = fastgpt.explain(decoding, model, model.new_cache(len(many)))
    assert reasons["cpu_replay"] == f"it takes up to {MAX_ROWS_CPU} sequences, and the cache has {len(many)}"
    monkeypatch.setitem(FASTEST, torch.float32, KERNEL)
    step = decoding(model, model.new_cache(len(many)))
    step(many)
    assert captured(step).refused is None
    assert fastgpt.explain(decoding, model, model.new_cache(len(many)))["cpu_replay"] == "chosen"


@torch.inference_mode()
def test_hooks_are_called_at_every_step():
    model, calls = random_model(), []
    hook = model.blocks[1].mlp.register_forward_hook(lambda *arguments: calls.append(1))
    generate(model, random_ids(model, 1, 4), 5)
    assert len(calls) == 5
    hook.remove()
    generate(model, random_ids(model, 1, 4), 5)
    assert len(calls) == 5


def other_forward(patch, model):
    forward = MLP.forward
    patch.setattr(MLP, "forward", lambda self, *arguments, **options: 2 * forward(self, *arguments, **options))


class DoubledMLP(MLP):
    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


class DoubledLogits(GPT):
    def uncapped_logits(self, hidden):
        return 2 * super().uncapped_logits(hidden)


CHANGES = {
    "eps": lambda patch, model: patch.setattr(model.blocks[1].mlp_norm, "eps", 1.0),
    "kind of norm": lambda patch, model: patch.setattr(model.norm, "kind", "rms"),
    "activation": lambda patch, model: patch.setattr(model.blocks[0].mlp, "activation", "relu"),
    "scale of attention": lambda patch, model: patch.setitem(model.blocks[0].attention.options, "scale", 2.0),
    "forward of a class": other_forward,
    "class of a module": lambda patch, model: patch.setattr(model.blocks[0].mlp, "__class__", DoubledMLP),
    "class of the model": lambda patch, model: patch.setattr(model, "__class__", DoubledLogits),
}


@torch.inference_mode()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_take_effect(change):
    def logits(changed: bool, recorded: bool):
        model = random_model()
        with pytest.MonkeyPatch.context() as patch:
            if not recorded:
                patch.setattr(Recording, "__call__", lambda self, x, tables=None: self.function(x, tables))
            step, token = decoding(model, model.new_cache(1)), torch.tensor([3])
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
    function = CpuReplay(lambda x: linear(x, weight).relu())
    for _ in range(3):
        x = torch.randn(1, 8)
        assert torch.equal(function(x), linear(x, weight).relu())
    assert function.refused == "aten.relu.default is not one of fastgpt's operations"


@torch.inference_mode()
def test_a_copy_inside_an_operation_is_not_captured():
    """A tensor that is not contiguous is copied at each call; the copy of the first must not be read again."""
    weight, bias = torch.randn(8, 8), torch.randn(16)[::2]
    function = CpuReplay(lambda x: linear(x, weight, bias))
    for _ in range(3):
        x = torch.randn(1, 8)
        bias.mul_(2)
        assert torch.equal(function(x), linear(x, weight, bias))
    assert function.refused == "an operation of fastgpt's cannot be recorded"


@pytest.mark.slow
def test_recording_loads_nothing_of_torch_compile():
    """Which takes longer than most generations."""
    program = (
        "import sys, torch, fastgpt; "
        "model = fastgpt.GPT.from_pretrained(fastgpt.SHIPPED_MODEL); before = set(sys.modules); "
        "fastgpt.generate(model, torch.tensor([[1, 2, 3]]), 4); print('torch._dynamo' in set(sys.modules) - before)"
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
            CpuReplay(fails)(torch.randn(1, 8))
    assert CpuReplay(lambda x: linear(x, torch.eye(8)))(torch.randn(1, 8)).shape == (1, 8)


@torch.inference_mode()
def test_two_captured_generations_side_by_side():
    model = random_model()
    ids = random_ids(model, 2, 6)
    alone = [generate(model, row[None], 20)[0] for row in ids]
    caches = [model.new_cache(1) for _ in ids]
    streams = [decoding(model, cache) for cache in caches]
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
def test_a_captured_step_generates_the_same_tokens(options, rules):
    model = random_model()
    prompts = [random_ids(model, 1, length, seed=length)[0] for length in (5, 14, 9)]
    options = options | rules | {"eos": [7, 8], "return_logprobs": True}
    rows, logprobs = generate(model, prompts, 40, **options)
    with graphs_on_cpu() as graphs:
        again, again_logprobs = generate(model, prompts, 40, **options)
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
        step = decoding(model, graphed)
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
        step = decoding(model, model.new_cache(2, 4))
        for _ in range(4):
            step(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"cache: expected at most 4 tokens \(its capacity\), got 4 stored \+ 1 new"):
            step(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="cache: expected batch size 3, as ids has, got 2"):
            step(torch.tensor([1, 2, 3]))


@torch.inference_mode()
def test_the_result_is_the_next_argument_and_stays_where_it_is():
    state = torch.zeros(1, dtype=torch.int64)

    def count(x):
        state.add_(1)
        return x + state

    with graphs_on_cpu():
        step, token, expected = CudaGraphReplay(count), torch.tensor([10]), 10
        places = set()
        for i in range(1, 6):
            token, expected = step(token), expected + i
            places.add(token.data_ptr())
            assert token.item() == expected
        assert len(places) == 1
        assert step(torch.tensor([100])).item() == 106 and state.item() == 6


@torch.inference_mode()
@pytest.mark.parametrize("name, dtype", [("sinks", torch.float32), ("sinks", torch.bfloat16), ("alibi_slopes", torch.float32)])
def test_numbers_of_heads_are_read_again(name, dtype):
    """Those of sinks and ALiBi, whose floats a recorded operation owns; the tensor may have changed in place."""
    q, k, v = torch.randn(3, 2, 4, 1, 16).to(dtype)
    k, v, numbers = k.repeat(1, 1, 40, 1), v.repeat(1, 1, 40, 1), torch.rand(4).to(dtype)
    attend = lambda q: fastgpt.attention(q, k, v, **{name: numbers})  # noqa: E731
    step = CpuReplay(attend)
    for _ in range(3):
        assert torch.equal(step(q), attend(q)) and step.refused is None
        torch.full((4,), 7.0)  # takes memory that was freed
        numbers.mul_(2)


@torch.inference_mode()
def test_a_step_that_waits_for_the_device_is_an_error_once_it_is_captured():
    """And the capture is ended, on the stream where it began."""
    with stubbed_cuda() as stub:
        step = CudaGraphReplay(lambda x: x * (2 if x.sum().item() > 0 else 3))
        assert step(torch.tensor([1, 1])).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="could not be captured in a CUDA graph .*waits for the device"):
            step(torch.tensor([1, 1]))
        assert stub.calls[-2:] == ["capture_begin", "capture_end"]


@torch.inference_mode()
def test_a_capture_neither_waits_nor_empties_the_allocator():
    with stubbed_cuda() as stub:
        step = CudaGraphReplay(lambda x: x + 1)
        for _ in range(4):
            step(torch.tensor([1]))
    assert stub.calls == [
        "wait_stream",
        "wait_stream",
        "CUDAGraph",
        "capture_begin",
        "capture_end",
        "replay",
        "replay",
        "replay",
    ]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model: model.double(), "kv_cache_update would be served by its reference, which waits .*torch.float64"),
        (lambda model: model.blocks[1].mlp.register_forward_hook(lambda *arguments: None), "blocks.1.mlp has hooks"),
        (lambda model: setattr(model.blocks[0], "mlp", Doubled(model.blocks[0].mlp)), "blocks.0.mlp is of a class .* Doubled"),
        (lambda model: setattr(model.norm, "forward", model.norm.forward), "norm has another forward"),
        (lambda model: setattr(model.blocks[1].attention.out, "waits", True), "blocks.1.attention.out waits for the device"),
    ],
    ids=["fp64", "hook", "class", "forward", "waits"],
)
def test_reasons_against_capture_are_known_before_it_is_tried(change, reason):
    model, ids = random_model(), random_ids(random_model(), 2, 5)
    change(model)
    expected = generate(model, ids, 12)
    with stubbed_cuda() as stub:
        assert torch.equal(generate(model, ids, 12), expected)
        assert re.match(reason, fastgpt.explain(fastgpt.decoding, model, model.new_cache(2))["cuda_graph"])
    assert stub.calls == []


class Doubled(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return 2 * self.module(*arguments)


@torch.inference_mode()
def test_within_the_callers_capture_a_step_just_runs():
    model = random_model()
    with stubbed_cuda() as stub, mock.patch.object(torch.Tensor, "is_cuda", True):
        calls = []
        recording = Recording(model, lambda x, tables: calls.append(1), CudaGraphReplay, lambda: None)
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            recording(torch.zeros(1))
    assert len(calls) == 1 and "CUDAGraph" not in stub.calls


# From one call of generate to the next

RULES = SAMPLED | {"no_repeat_ngram_size": 3, "logit_bias": {5: -2.0}, "min_new_tokens": 4, "seed": 4}


@pytest.mark.parametrize("rules", [{}, RULES], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", GRAPHED, ids=str)
def test_a_graph_serves_later_calls(options, rules):
    """Of prompts of the same lengths, with the same options: the tokens are those without, and nothing is captured."""
    model, options = random_model(), options | rules | {"eos": [7, 8], "return_logprobs": True}
    calls = [[random_ids(model, 1, n, seed=seed + n)[0] for n in (5, 14, 9)] for seed in (0, 50, 100)]
    expected = []
    for prompts in calls:
        sessions.forget(model)
        expected.append(generate(model, prompts, 12, **options))
    sessions.forget(model)
    with stubbed_cuda() as stub:
        results = [generate(model, prompts, 12, **options) for prompts in calls]  # kept: a later call leaves them as they are
        assert stub.calls.count("CUDAGraph") == 1 and not {"synchronize", "empty_cache"} & set(stub.calls)
    for (rows, logprobs), (expected_rows, expected_logprobs) in zip(results, expected):
        assert all(map(torch.equal, rows, expected_rows)) and all(map(torch.equal, logprobs, expected_logprobs))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5}, {"top_k": 3}, {"eos": 3}, {"return_logprobs": True}, {"num_samples": 2}, {"window": 7},
        {"cache": "paged"}, {"cache_dtype": torch.int8}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_with_other_options_has_a_graph_of_its_own(options):
    model = random_model()
    ids = random_ids(model, 2, 5)
    with stubbed_cuda() as stub:
        first = generate(model, ids, 9)
        generate(model, ids, 9, **options)
        assert torch.equal(generate(model, ids, 9), first)
        assert len(stub.graphs) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.rand(64))),
        lambda model: setattr(model.blocks[0].mlp.up.weight, "data", torch.randn(256, 64)),
        lambda model: setattr(model.blocks[1], "mlp", random_model(seed=4).blocks[0].mlp),
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(random_model(seed=9).state_dict(), assign=True),
    ],
    ids=["weight", "storage", "module", "dtype", "state"],
)
def test_a_changed_model_is_recaptured(change):
    """And what was captured is gone, with the memory of the weights that it was captured with."""
    model = random_model()
    ids = random_ids(model, 2, 5)
    with stubbed_cuda() as stub:
        generate(model, ids, 9)
        (storage,) = [StorageWeakRef(cache.storage.k.untyped_storage()) for _, cache, _ in sessions.of_model[model].values()]
        change(model)
        actual = generate(model, ids, 9)
        assert len(stub.graphs) == 2
        stub.graphs.clear()
        gc.collect()
        assert storage.expired()
    sessions.forget(model)
    assert torch.equal(actual, generate(model, ids, 9, use_cache=False))


def test_weights_that_change_in_place_are_seen_by_later_calls():
    model, other = random_model(), random_model(seed=5)
    ids = random_ids(model, 2, 5)
    with stubbed_cuda() as stub:
        generate(model, ids, 9)
        model.load_state_dict(other.state_dict())
        assert torch.equal(generate(model, ids, 9), generate(other, ids, 9, use_cache=False)) and len(stub.graphs) == 1


def test_sessions_are_few_and_go_with_the_model():
    model = random_model()
    ids = random_ids(model, 2, 5)
    for new in range(2, 9):
        generate(model, ids, new)
    kept = sessions.of_model[model]
    assert len(kept) == sessions.MOST
    storages = [StorageWeakRef(cache.storage.k.untyped_storage()) for _, cache, _ in kept.values()]
    with mock.patch.object(sessions, "BYTES", 0):  # less than a cache takes
        generate(model, ids, 80)
        assert sum(cache.nbytes for _, cache, _ in kept.values()) <= sum(weight.nbytes for weight in model.parameters())
    gone = weakref.ref(model)
    del model, kept
    gc.collect()
    assert gone() is None and all(expired(storages))


def test_sessions_go_when_memory_is_short():
    model = random_model()
    ids, new_cache = random_ids(model, 2, 5), model.new_cache
    generate(model, ids, 9)

    def short(*args, **options):
        if model in sessions.of_model:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_cache(*args, **options)

    with mock.patch.object(model, "new_cache", short):
        assert generate(model, ids, 12).shape == (2, 17)


def test_calls_at_once_share_no_session():
    """One that is on its way keeps its memory to itself; and its tokens are what they were, whoever comes after it."""
    model = random_model()
    ids, others = random_ids(model, 2, 5), random_ids(model, 2, 5, seed=8)
    expected, expected_others = generate(model, ids, 9)[:, 5:], generate(model, others, 9)[:, 5:]
    first = stream(model, ids, 9)
    tokens = [next(first), next(first)]
    assert torch.equal(torch.stack(list(stream(model, others, 9)), 1), expected_others)
    tokens += first
    generate(model, others, 9)
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_results_are_taken_before_a_session_is_left(monkeypatch):
    """Another thread may have it at once."""
    model = random_model()
    ids, others = random_ids(model, 2, 5), random_ids(model, 2, 5, seed=8)
    expected = generate(model, ids, 9)
    leave = sessions.leave

    def leave_and_lose(*session):
        leave(*session)
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "leave", leave)
            generate(model, others, 9)

    monkeypatch.setattr(sessions, "leave", leave_and_lose)
    assert torch.equal(generate(model, ids, 9), expected)


def test_a_call_that_fails_leaves_no_session():
    model = random_model()
    ids = random_ids(model, 1, 5)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits: expected finite ones"):
        generate(model, ids, 5)
    assert not sessions.of_model.get(model)


def test_recorded_steps_serve_later_calls():
    """On a CPU as well."""
    model = random_model()
    ids = random_ids(model, 2, 5)
    expected = generate(model, ids, 9)
    with mock.patch.object(CpuReplay, "_record", side_effect=AssertionError("recorded again")):
        assert torch.equal(generate(model, ids, 9), expected)


# What is read by its address


def expired(reads):
    return [x.expired() for x in reads]


def replaced(state):
    state.update({name: x.clone() for name, x in state.items()})


def cleared(state):
    """Their memory is another's from now on, though the tensors are there."""
    for x in state.values():
        x.set_(torch.zeros_like(x))


@torch.inference_mode()
@pytest.mark.parametrize("leaves", [replaced, cleared])
def test_a_graph_owns_what_it_reads(leaves):
    """Tables, slopes, counters, masks and scales, whatever becomes of those who had them; and not what it makes on its way."""
    state = {name: torch.randn(8) for name in ("cos", "slopes", "sinks", "scale", "mask")}

    def function(x):
        made = x + state["cos"]
        for name in ("slopes", "sinks", "scale", "mask"):
            made = made * state[name]
        return made.view(2, 4).sum()

    with stubbed_cuda(plays=False) as stub:
        step = CudaGraphReplay(function)
        step(torch.randn(8))
        step(torch.randn(8))
        (graph,) = stub.graphs
        assert sum(expired(graph.reads)) >= 5  # of what it made, nothing is held
        held = [x for x in graph.reads if not x.expired()]
        leaves(state)
        state.clear()
        assert len(held) >= 6 and not any(expired(held))  # the argument, too
        del step
        assert all(expired(held))


@torch.inference_mode()
@pytest.mark.parametrize("leaves", [replaced, cleared])
def test_a_recorded_step_owns_what_it_reads(leaves):
    state = {"weight": torch.randn(8, 8), "bias": torch.randn(8)}
    step, x = CpuReplay(lambda x: linear(linear(x, state["weight"], state["bias"]), state["weight"])), torch.randn(1, 8)
    expected = step(x).clone()
    held = [StorageWeakRef(value.untyped_storage()) for value in state.values()]
    leaves(state)
    state.clear()
    assert step.refused is None and torch.equal(step(x), expected) and not any(expired(held))
    del step
    assert all(expired(held))


@torch.inference_mode()
@pytest.mark.parametrize("fields", [{"position": "rotary", "rope": Rope(16)}, {"position": "sinusoidal"}], ids=str)
def test_a_graph_owns_its_tables_when_the_model_makes_longer_ones(fields):
    model = random_model(context=5000, **fields)
    with stubbed_cuda(plays=False) as stub:
        step, token = decoding(model, model.new_cache(1, 50)), torch.tensor([1])
        step(token)
        step(token)
        ((_, *keys),) = model.tables.held
        tables = [StorageWeakRef(x.untyped_storage()) for x in model.tables(1, token, *keys)]
        model.tables(4000, token, *keys)
        model.tables.held.clear()
        model.tables.replaced.clear()
        assert not any(expired(tables))
        assert {x.cdata for x in tables} <= {x.cdata for x in stub.graphs[0].reads}


def test_tables_that_were_replaced_stay_where_a_graph_of_the_caller_reads_them():
    tables, x = Tables(Rope(16).rotation, 5000), torch.zeros(1)
    first = [StorageWeakRef(table.untyped_storage()) for table in tables(10, x)]
    tables(4000, x)
    assert not any(expired(first))
    assert sum(len(old[0]) for old in tables.replaced) <= len(tables(10, x)[0])


@torch.inference_mode()
def test_a_graph_owns_the_stream_that_it_attends_to():
    """A second one in its place, and the first one's memory is still there."""
    model = random_model(cross_attention=True)
    with stubbed_cuda(plays=False) as stub:
        cache = model.new_cache(1, 20, encoder_states=torch.randn(1, 7, 64))
        step = decoding(model, cache)
        step(torch.tensor([1]))
        step(torch.tensor([1]))
        first = [StorageWeakRef(x.untyped_storage()) for layer in cache.encoder_kv.layers for x in layer]
        cache.encoder_kv = None
        assert not any(expired(first)) and {x.cdata for x in first} <= {x.cdata for x in stub.graphs[0].reads}


@torch.inference_mode()
def test_the_tape_detects_what_a_graph_cannot_replay():
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
