"""Generation: the tokens of transformers, whatever the cache and the batch; streams, ends, defaults, bad arguments."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from generation_cases import cut, generated_by_transformers, prompts_of
from models import random_ids, random_model

from fastgpt import GPT, SHIPPED_MODEL, generate
from fastgpt.generation import request
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.generate import stream
from fastgpt.generation.request import Request
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer

SETTINGS = [
    # layers, heads, width, batch, prompt
    (1, 1, 16, 1, 1),
    (2, 2, 32, 3, 5),
    (3, 4, 64, 2, 17),
    (2, 8, 128, 4, 1),
    (4, 3, 96, 1, 40),
    (2, 1, 80, 2, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize("layers, heads, width, batch, prompt", SETTINGS)
def test_cached_and_uncached_tokens_are_identical(layers, heads, width, batch, prompt):
    for seed in range(3):
        model = random_model(layers=layers, heads=heads, width=width, context=128, seed=seed)
        ids = random_ids(model, batch, prompt, seed)
        cached, uncached = (generate(model, ids, 64, use_cache=use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached)
        assert cached.shape == (batch, prompt + 64) and torch.equal(cached[:, :prompt], ids)
        assert len(cached[:, prompt:].unique()) > 3  # a model stuck on a token or two would prove little


@pytest.mark.slow
def test_shipped_model_generates_300_identical_tokens():
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("ROMEO:\n")])
    cached, uncached = (generate(model, ids, 300, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.slow
def test_a_cached_step_takes_a_fifth_of_the_time_at_200_tokens():
    """Of a CPU's time, on one thread: how busy the machine is does not count."""
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32, device="cpu")
    ids, threads = random_ids(model, 1, 190), torch.get_num_threads()

    def seconds_per_token(use_cache):
        """The quickest step of those around a context of 200 tokens."""
        times = []
        for _ in stream(model, ids, 21, use_cache=use_cache):
            times.append(time.thread_time())
        return min(after - before for before, after in itertools.pairwise(times))

    torch.set_num_threads(1)
    try:
        assert seconds_per_token(False) >= 5 * seconds_per_token(True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_shipped_model_writes_like_a_play():
    """Sampled text has lines of a play's length and speakers' names before their speeches."""
    model = GPT.from_pretrained(SHIPPED_MODEL)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("\n")] * 8)
    texts = [tokenizer.decode(row) for row in generate(model, ids, 400, temperature=0.8, seed=range(8)).tolist()]
    lines = "\n".join(texts).splitlines()
    speakers = [line for line in lines if line.endswith(":") and line[0].isupper() and len(line) < 30]
    assert len(speakers) >= 8  # about one in 100 to 400 characters of the corpus
    spoken = [len(line) for line in lines if line and line not in speakers]
    assert 20 < sum(spoken) / len(spoken) < 60


def test_stream_yields_what_generate_returns_and_leaves_the_mode():
    model = random_model(dropout=0.3).train()
    ids = random_ids(model, 2, 4)
    new = torch.stack(list(stream(model, ids, 10)), dim=1)
    assert torch.equal(torch.cat([ids, new], dim=1), generate(model, ids, 10)) and model.training
    abandoned = stream(model, ids, 10)
    next(abandoned)
    abandoned.close()
    assert model.training


def test_no_new_tokens():
    model = random_model()
    ids = random_ids(model, 2, 4)
    assert torch.equal(generate(model, ids, 0), ids)


def test_the_context_can_be_filled():
    model = random_model(context=16)
    assert generate(model, random_ids(model, 1, 4), 12).shape == (1, 16)


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.9}], ids=str)
@pytest.mark.parametrize("lengths", [[12], [30, 1, 7, 19]], ids=str)
def test_greedy_tokens_are_those_of_transformers(twins, lengths, rules):
    ours, theirs = twins
    prompts = prompts_of(*lengths)
    expected = generated_by_transformers(theirs, prompts, 64, **rules)
    for options in ({}, {"use_cache": False}, {"cache": "paged"}, {"prefill_chunk": 4}):
        actual = generate(ours, prompts, 64, **rules, **options)
        for row, prompt, new in zip(actual, prompts, expected, strict=True):
            assert row.tolist() == prompt + new.tolist()


def test_eos_tokens_match_transformers(twins):
    """Rows of one length, and several tokens that end them, at different steps."""
    ours, theirs = twins
    ids = random_ids(ours, 4, 9)
    free = generate(ours, ids, 40)[:, 9:]
    eos = [free[0, 11].item(), free[1, 4].item()]
    expected = generated_by_transformers(theirs, ids.tolist(), 40, eos_token_id=eos, pad_token_id=eos[0])
    assert torch.equal(generate(ours, ids, 40, eos=eos)[:, 9:], expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache": "paged", "page_size": 4}], ids=str)
def test_a_row_ends_at_its_eos(ending, options):
    model, prompts, free, eos = ending
    rows = generate(model, prompts, 30, eos=eos, **options)
    for row, prompt, new in zip(rows, prompts, free, strict=True):
        assert row.tolist() == prompt + cut(new, eos)


def test_a_stream_that_a_program_leaves_unfinished_says_nothing_as_it_ends():
    program = f"""
import fastgpt
model = fastgpt.GPT.from_pretrained({str(SHIPPED_MODEL)!r})
tokens = fastgpt.stream(model, [[1, 2, 3]], 10)
for _ in range(5):
    next(tokens)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_stream_yields_minus_one_after_eos(ending):
    model, prompts, free, eos = ending
    steps = torch.stack(list(stream(model, prompts, 30, eos=[eos])), dim=1).tolist()
    for row, new in zip(steps, free, strict=True):
        assert row == cut(new, eos) + [-1] * (30 - len(cut(new, eos)))


def test_generation_ends_with_the_last_row(ending):
    model, prompts, free, eos = ending
    alone = [(prompt, new) for prompt, new in zip(prompts, free) if eos in new]
    longest = max(len(cut(new, eos)) for _, new in alone)
    assert longest < 30 and len(list(stream(model, [prompt for prompt, _ in alone], 30, eos=eos))) == longest


def test_eos_detected_late_changes_only_the_stream(ending, monkeypatch):
    """On a GPU, one looks at every 16th step only."""
    model, prompts, free, eos = ending
    alone = [prompt for prompt, new in zip(prompts, free) if eos in new]
    rows, steps = generate(model, alone, 30, eos=eos), list(stream(model, alone, 30, eos=eos))
    ids = torch.tensor([prompt[-2:] for prompt in alone])
    table = generate(model, ids, 30, eos=eos)
    monkeypatch.setitem(request.EOS_POLL_INTERVAL, "cpu", 16)
    assert all(map(torch.equal, generate(model, alone, 30, eos=eos), rows))
    assert torch.equal(generate(model, ids, 30, eos=eos), table)
    late = list(stream(model, alone, 30, eos=eos))
    assert len(late) == -(-len(steps) // 16) * 16 > len(steps) and all(map(torch.equal, late, steps))
    assert all((step == -1).all() for step in late[len(steps) :])


def test_a_tensor_is_padded_with_eos_and_no_wider_than_its_longest_row():
    model = random_model()
    ids = random_ids(model, 3, 5)
    free = generate(model, ids, 20)[:, 5:].tolist()
    eos = sorted({row[i] for i, row in enumerate(free)})  # the rows end after one, two and three tokens at the latest
    result = generate(model, ids, 20, eos=eos)
    lengths = [min(row.index(token) for token in eos if token in row) + 1 for row in free]
    assert torch.equal(result[:, :5], ids) and result.shape == (3, 5 + max(lengths))
    for row, new, length in zip(result[:, 5:].tolist(), free, lengths):
        assert row == new[:length] + [eos[0]] * (max(lengths) - length)


def test_arguments_override_defaults_of_the_checkpoint_which_override_ours(ending):
    model, prompts, free, eos = ending
    rules = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3}
    expected = generate(model, prompts, 7, seed=1, eos=eos, **rules)
    model.generation_defaults = rules | {"max_new_tokens": 7, "eos": [eos, 10**6]}  # one that is not in the vocabulary
    try:
        assert all(map(torch.equal, generate(model, prompts, seed=1), expected))
        assert len(list(stream(model, prompts, seed=1))) <= 7
        ours = {"temperature": 0.0, "top_k": None, "repetition_penalty": 1.0, "eos": ()}
        rows = generate(model, prompts, 30, **ours)
        assert [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts)] == free
        without_top_k = generate(model, prompts, 9, seed=1, top_k=None)
        model.generation_defaults = {"temperature": 0.7, "repetition_penalty": 1.3, "eos": eos}
        assert all(map(torch.equal, generate(model, prompts, 9, seed=1), without_top_k))
    finally:
        del model.generation_defaults


def test_by_default_generation_ends_where_the_context_does():
    model = random_model(context=500)
    assert [len(generate(model, [[1] * length])[0]) for length in (1, 300, 499, 500)] == [301, 500, 500, 500]
    assert [len(row) for row in generate(model, [[1], [1] * 490])] == [11, 500]
    model.generation_defaults = {"max_new_tokens": 9}
    assert [len(generate(model, [[1] * length])[0]) for length in (1, 498)] == [10, 500]
    with pytest.raises(ValueError, match="max_new_tokens: expected at most 2 after a prompt of 498 .* of 500, got 3"):
        generate(model, [[1] * 498], 3)


CACHES = [{}, {"cache": "sliding", "window": 9}, {"cache": "paged", "page_size": 4}, {"cache_dtype": torch.int8}]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 16, 39])
@pytest.mark.parametrize("options", CACHES, ids=str)
def test_chunked_prefill_gives_the_same_logits(options, chunk):
    """Also of prompts that begin pieces after others, which are padding there."""
    model = random_model()
    prompts = [torch.tensor(prompt) for prompt in prompts_of(40, 5, 23)]

    def logits(prefill_chunk):
        request = Request(model, prompts, 8, GenerationConfig(prefill_chunk=prefill_chunk, **options))
        return request.prefill(request.prompts), request.cache

    actual, cache = logits(chunk)
    assert cache.counts == [40, 5, 23] and cache.lengths.tolist() == [40, 5, 23]
    model.double()
    numerics.check(actual, lambda: logits(40)[0])


def test_prefill_chunks_are_at_most_prefill_chunk_and_nearly_equal(monkeypatch):
    model, passes = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a, **k: passes.append(ids.shape[1]) or hidden(ids, *a, **k))
    for length, chunk, expected in ((65, 64, [33, 32]), (64, 64, [64]), (10, 4, [4, 4, 2]), (3, 1, [1, 1, 1])):
        passes.clear()
        generate(model, random_ids(model, 2, length), 1, prefill_chunk=chunk)
        assert passes == expected


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 4}, {"use_cache": False}, {"num_samples": 3}], ids=str)
def test_only_the_last_positions_logits_are_computed(options, monkeypatch):
    model, rows = random_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(hidden[..., 0].numel()) or logits(hidden))
    generate(model, prompts_of(30, 11), 1, **options)
    assert rows == [2]


BAD = [
    ({"ids": "ROMEO"}, TypeError, "ids: expected a torch.Tensor or a list of prompts, got str"),
    ({"ids": [1, 2]}, TypeError, "ids: expected each prompt to be a list of integers or a 1-d tensor, got 1"),
    ({"ids": [[1, 2], "ROMEO"]}, TypeError, "ids: expected each prompt to be a list of integers .*, got 'ROMEO'"),
    ({"ids": [[1, 2.5]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[1, 2.5\]"),
    ({"ids": [[[1], [2]]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[\[1\], \[2\]\]"),
    (
        {"ids": [[2**70] * 90]},
        TypeError,
        r"ids: expected each prompt to be a list of integers .*, got \[1180591620717411303424, .*\.\.\.$",
    ),
    ({"ids": [[1] * 97, [1]]}, ValueError, r"ids: expected a prompt of at most 96 tokens, the model's context, got 97"),
    ({"ids": []}, ValueError, r"ids: expected at least one sequence, .* got shapes \[\]"),
    ({"ids": [[1], []]}, ValueError, r"ids: .* each of at least one token, got shapes \[\(1,\), \(0,\)\]"),
    ({"ids": [[1], [65]]}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"ids: .* each of at least one token, got shapes \[\(0,\)\]"),
    ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids: expected shape \(B, T\).*, got shape \(3,\)"),
    ({"ids": torch.zeros(1, 3, dtype=torch.int64, device="meta")}, ValueError, "ids: expected tokens on cpu, .* some on meta"),
    ({"ids": torch.zeros(1, 3)}, TypeError, "ids: expected dtype torch.int64, got torch.float32"),
    ({"ids": torch.tensor([[1, 65]])}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.tensor([[-1, 5]])}, ValueError, "ids: expected token ids from 0 to 64, got -1"),
    ({"max_new_tokens": 92}, ValueError, "max_new_tokens: expected at most 91 after a prompt of 5 .* of 96, got 92"),
    ({"ids": np.array([[2**64 - 1]], dtype=np.uint64)}, ValueError, "ids: expected token ids from 0 to 64, got 1844.*615"),
    ({"ids": [np.array([2**63], dtype=np.uint64)]}, ValueError, "ids: expected token ids .*, got 9223372036854775808"),
    ({"ids": np.zeros((1, 3))}, TypeError, "ids: expected integers, got an array of float64"),
    ({"ids": [np.array([1, 65])]}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.zeros(1, 3, dtype=torch.int64).to_sparse()}, TypeError, "ids: expected a strided tensor, got layout"),
    ({"ids": b"ROMEO"}, TypeError, "ids: expected a torch.Tensor or a list of prompts, got bytes"),
    (
        {"cache": "sliding"},
        ValueError,
        "window: expected a number of tokens for a sliding cache of a model without windows, got None",
    ),
    ({"cache": "ring"}, ValueError, "cache: expected one of 'contiguous', 'sliding', 'paged', got 'ring'"),
    ({"cache": None}, ValueError, "cache: expected one of 'contiguous', 'sliding', 'paged', got None"),
    ({"cache": ["paged"]}, ValueError, r"cache: expected one of .*, got \['paged'\]"),
    ({"cache_dtype": torch.int32}, TypeError, "cache_dtype: expected torch.float32 .* got torch.int32"),
    ({"cache_dtype": "int8"}, TypeError, "cache_dtype: expected a torch.dtype or None, got 'int8'"),
    ({"beams": 3}, TypeError, "beams: unexpected keyword argument 'beams', expected one of logit_bias, .*"),
    ({"seed": -1}, ValueError, r"seed: expected integers from 0 to 2\*\*64 - 1, got -1"),
    ({"seed": 2**64}, ValueError, r"seed: expected integers from 0 to 2\*\*64 - 1, got 18446744073709551616"),
    ({"seed": "one"}, TypeError, "seed: expected an integer or a list of integers, got 'one'"),
    ({"seed": [1, 2]}, ValueError, "seed: expected one integer or 1, one for each prompt, got 2"),
    ({"eos": 65}, ValueError, "eos: expected token ids from 0 to 64, got 65"),
    ({"eos": 1.5}, TypeError, "eos: expected an integer or a list of integers, got 1.5"),
    ({"eos": [3, None]}, TypeError, r"eos: expected an integer or a list of integers, got \[3, None\]"),
    ({"num_samples": 2**64}, ValueError, "num_samples: expected at most 1048576 of 1 prompts, got 18446744073709551616"),
    ({"logit_bias": [3]}, TypeError, r"logit_bias: expected a dict of token ids and numbers .*, got \[3\]"),
    ({"logit_bias": {"3": 1.0}}, TypeError, "logit_bias: expected an integer >= 0, got '3'"),
    ({"logit_bias": {65: 1.0}}, ValueError, "logit_bias: expected token ids from 0 to 64, got 65"),
    ({"logit_bias": {3: "a"}}, TypeError, "logit_bias: expected a finite number .*, got 'a'"),
    ({"logit_bias": {3: float("inf")}}, ValueError, "logit_bias: expected a finite number .*, got inf"),
    ({"logit_bias": {3: 1e39}}, ValueError, "logit_bias: expected a finite number .*, got 1e.39"),
    ({"logits_processors": "abc"}, TypeError, "logits_processors: expected a callable or a list of them, got 'abc'"),
    ({"logits_processors": [3]}, TypeError, r"logits_processors: expected a callable or a list of them, got \[3\]"),
]

NUMBERS = {
    "temperature": (-0.1, 1e400),
    "top_p": (0.0, 1.5),
    "min_p": (-0.1, 1.5),
    "repetition_penalty": (0.0, 1e101),
    "top_k": (0,),
    "max_new_tokens": (-1,),
    "min_new_tokens": (-1,),
    "no_repeat_ngram_size": (-1,),
    "window": (0,),
    "page_size": (0,),
    "num_samples": (0,),
    "prefill_chunk": (0,),
}

INTEGERS = set(NUMBERS) - {"temperature", "top_p", "min_p", "repetition_penalty"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked(name):
    model = random_model()
    outside = [(value, ValueError) for value in NUMBERS[name]]
    no_numbers = [(value, TypeError) for value in ("a", True, [1], {}, b"1", torch.tensor(1.0), 1j)]
    no_numbers += [(value, TypeError if name in INTEGERS else ValueError) for value in (float("nan"), float("inf"))]
    for value, error in outside + no_numbers + [(1.5, TypeError)] * (name in INTEGERS):
        for function in (generate, stream):
            if function is generate and name == "max_new_tokens" and isinstance(value, list):  # one for each prompt
                continue
            with pytest.raises(error, match=f"^{name}: expected "):
                function(**{"model": model, "ids": [[1, 2]], "max_new_tokens": 3, name: value})


@pytest.mark.parametrize("name", ["use_cache", "return_logprobs"])
def test_flags_are_checked(name):
    for value in (1, None, "yes", [True]):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got "):
            generate(random_model(), [[1]], 1, **{name: value})


def test_numbers_of_numpy_and_arrays_are_as_good():
    model = random_model()
    ids = random_ids(model, 2, 5)
    options = {"temperature": 0.5, "top_k": 9, "top_p": 0.9, "seed": [3, 4], "eos": [7, 8], "window": 50}
    expected = generate(model, ids, 9, **options)
    others = {"temperature": np.float32(0.5), "top_k": np.int8(9), "top_p": np.float64(0.9), "seed": np.array([3, 4])}
    others |= {"eos": (np.int64(7), np.uint8(8)), "window": 2**64, "page_size": 2**64}
    for given in (ids.numpy(), ids.to(torch.int32).numpy(), np.ascontiguousarray(ids.numpy().astype(np.uint64))):
        assert torch.equal(generate(model, given, np.int64(9), **others), expected)
    rows = generate(model, [np.array(row, dtype=np.int16) for row in ids.tolist()], 9, cache="paged", **others)
    assert [row.tolist() for row in rows] == [cut_at(row, 5, (7, 8)) for row in expected.tolist()]


def cut_at(row, begin, eos):
    ends = [i for i in range(begin, len(row)) if row[i] in eos]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors(change, error, message):
    model = random_model()
    arguments = {"ids": random_ids(model, 1, 5), "max_new_tokens": 4} | change
    with pytest.raises(error, match=message):
        generate(model, **arguments)
