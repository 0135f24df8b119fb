"""Generation: the tokens of transformers, whatever the cache and the batch; ends, samples, log-probabilities, pieces."""

import itertools
import statistics
import time

import numerics
import pytest
import torch
import transformers
from models import random_ids, random_model

from fastgpt import GPT, generate
from fastgpt.cli import SHIPPED_MODEL
from fastgpt.generate import Options, Request, stream
from fastgpt.text import Tokenizer

SETTINGS = [
    # layers, heads, width, batch, prompt
    (1, 1, 16, 1, 1),
    (2, 2, 32, 3, 5),
    (3, 4, 64, 2, 17),
    (2, 8, 128, 4, 1),
    (4, 3, 96, 1, 40),
    (2, 1, 80, 2, 64),
]


@pytest.mark.parametrize("layers, heads, width, batch, prompt", SETTINGS)
def test_cached_and_uncached_tokens_are_identical(layers, heads, width, batch, prompt):
    for seed in range(3):
        model = random_model(layers=layers, heads=heads, width=width, context=128, seed=seed)
        ids = random_ids(model, batch, prompt, seed)
        cached, uncached = (model.generate(ids, 64, use_cache=use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached)
        assert cached.shape == (batch, prompt + 64) and torch.equal(cached[:, :prompt], ids)
        assert len(cached[:, prompt:].unique()) > 3  # a model stuck on a token or two would prove little


@pytest.mark.slow
def test_shipped_model_generates_300_identical_tokens():
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("ROMEO:\n")])
    cached, uncached = (model.generate(ids, 300, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound is for a CPU")
def test_cached_decoding_is_five_times_as_fast_at_200_tokens():
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    ids = random_ids(model, 1, 190)

    def seconds_per_token(use_cache):
        """The median step of those around a context of 200 tokens."""
        times = []
        for _ in stream(model, ids, 21, use_cache=use_cache):
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    seconds_per_token(True), seconds_per_token(False)  # warm up
    # In turns, so that a busy machine slows both.
    ratios = [seconds_per_token(False) / seconds_per_token(True) for _ in range(5)]
    assert statistics.median(ratios) >= 5, ratios


def test_shipped_model_writes_like_a_play():
    """Sampled text has lines of a play's length and speakers' names before their speeches."""
    model = GPT.from_pretrained(SHIPPED_MODEL)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("\n")] * 8)
    texts = [tokenizer.decode(row) for row in model.generate(ids, 400, temperature=0.8, seed=range(8)).tolist()]
    lines = "\n".join(texts).splitlines()
    speakers = [line for line in lines if line.endswith(":") and line[0].isupper() and len(line) < 30]
    assert len(speakers) >= 8  # about one in 100 to 400 characters of the corpus
    spoken = [len(line) for line in lines if line and line not in speakers]
    assert 20 < sum(spoken) / len(spoken) < 60


def test_stream_yields_what_generate_returns_and_leaves_the_mode():
    model = random_model(dropout=0.3).train()
    ids = random_ids(model, 2, 4)
    new = torch.stack(list(stream(model, ids, 10)), dim=1)
    assert torch.equal(torch.cat([ids, new], dim=1), model.generate(ids, 10)) and model.training
    abandoned = stream(model, ids, 10)
    next(abandoned)
    abandoned.close()
    assert model.training


def test_no_new_tokens():
    model = random_model()
    ids = random_ids(model, 2, 4)
    assert torch.equal(model.generate(ids, 0), ids)


def test_the_context_can_be_filled():
    model = random_model(context=16)
    assert model.generate(random_ids(model, 1, 4), 12).shape == (1, 16)


# As transformers


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A model, and transformers' own of the same weights."""
    folder = tmp_path_factory.mktemp("model")
    model = random_model(layers=3, context=128)
    model.save_pretrained(folder)
    return model, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def prompts_of(*lengths):
    return [random_ids(random_model(), 1, length, seed=length)[0].tolist() for length in lengths]


def generated_by_transformers(model, prompts, new, **options):
    """New tokens of each prompt; the batch is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[:, longest:]


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.9}], ids=str)
@pytest.mark.parametrize("lengths", [[12], [30, 1, 7, 19]], ids=str)
def test_greedy_tokens_are_those_of_transformers(twins, lengths, rules):
    ours, theirs = twins
    prompts = prompts_of(*lengths)
    expected = generated_by_transformers(theirs, prompts, 64, **rules)
    for options in ({}, {"use_cache": False}, {"cache": "paged"}, {"prefill_chunk": 4}):
        actual = ours.generate(prompts, 64, **rules, **options)
        for row, prompt, new in zip(actual, prompts, expected, strict=True):
            assert row.tolist() == prompt + new.tolist()


def test_ends_are_those_of_transformers(twins):
    """Rows of one length, and several tokens that end them, at different steps."""
    ours, theirs = twins
    ids = random_ids(ours, 4, 9)
    free = ours.generate(ids, 40)[:, 9:]
    eos = [free[0, 11].item(), free[1, 4].item()]
    expected = generated_by_transformers(theirs, ids.tolist(), 40, eos_token_id=eos, pad_token_id=eos[0])
    assert torch.equal(ours.generate(ids, 40, eos=eos)[:, 9:], expected)


# Ends


@pytest.fixture(scope="module")
def ending():
    """A model, prompts of different lengths, what follows on them without an end, and a token that ends only some of them."""
    model = random_model()
    prompts = prompts_of(3, 9, 5, 2)
    free = [row[len(prompt) :].tolist() for prompt, row in zip(prompts, model.generate(prompts, 30))]
    eos = next(token for token in free[0] if 0 < sum(token in row for row in free) < 4 and free[0].index(token) > 2)
    return model, prompts, free, eos


def cut(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache": "paged", "page_size": 4}], ids=str)
def test_a_row_ends_with_its_eos(ending, options):
    model, prompts, free, eos = ending
    rows = model.generate(prompts, 30, eos=eos, **options)
    for row, prompt, new in zip(rows, prompts, free, strict=True):
        assert row.tolist() == prompt + cut(new, eos)


def test_a_stream_gives_minus_one_after_the_end(ending):
    model, prompts, free, eos = ending
    steps = torch.stack(list(stream(model, prompts, 30, eos=[eos])), dim=1).tolist()
    for row, new in zip(steps, free, strict=True):
        assert row == cut(new, eos) + [-1] * (30 - len(cut(new, eos)))


def test_generation_ends_with_the_last_row(ending):
    model, prompts, free, eos = ending
    alone = [(prompt, new) for prompt, new in zip(prompts, free) if eos in new]
    longest = max(len(cut(new, eos)) for _, new in alone)
    assert longest < 30 and len(list(stream(model, [prompt for prompt, _ in alone], 30, eos=eos))) == longest


def test_ends_that_are_seen_late_change_nothing_but_the_stream(ending, monkeypatch):
    """On a GPU, one looks at every 16th step only."""
    model, prompts, free, eos = ending
    alone = [prompt for prompt, new in zip(prompts, free) if eos in new]
    rows, steps = model.generate(alone, 30, eos=eos), list(stream(model, alone, 30, eos=eos))
    ids = torch.tensor([prompt[-2:] for prompt in alone])
    table = model.generate(ids, 30, eos=eos)
    monkeypatch.setitem(generate.STEPS_PER_LOOK, "cpu", 16)
    assert all(map(torch.equal, model.generate(alone, 30, eos=eos), rows))
    assert torch.equal(model.generate(ids, 30, eos=eos), table)
    late = list(stream(model, alone, 30, eos=eos))
    assert len(late) == -(-len(steps) // 16) * 16 > len(steps) and all(map(torch.equal, late, steps))
    assert all((step == -1).all() for step in late[len(steps) :])


def test_a_tensor_is_padded_with_eos_and_no_wider_than_its_longest_row():
    model = random_model()
    ids = random_ids(model, 3, 5)
    free = model.generate(ids, 20)[:, 5:].tolist()
    eos = sorted({row[i] for i, row in enumerate(free)})  # the rows end after one, two and three tokens at the latest
    result = model.generate(ids, 20, eos=eos)
    lengths = [min(row.index(token) for token in eos if token in row) + 1 for row in free]
    assert torch.equal(result[:, :5], ids) and result.shape == (3, 5 + max(lengths))
    for row, new, length in zip(result[:, 5:].tolist(), free, lengths):
        assert row == new[:length] + [eos[0]] * (max(lengths) - length)


# Seeds

SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache": "paged", "page_size": 4}, {"cache": "sliding", "window": 96}], ids=str
)
def test_the_same_seed_gives_the_same_tokens_without_cache_and_in_any_cache(options):
    model = random_model()
    prompts = prompts_of(5, 11)
    expected = model.generate(prompts, 40, seed=7, **SAMPLED)
    assert all(map(torch.equal, model.generate(prompts, 40, seed=7, **SAMPLED, **options), expected))
    assert not any(map(torch.equal, model.generate(prompts, 40, seed=8, **SAMPLED, **options), expected))


def test_the_same_seed_gives_the_same_tokens_in_every_batch_and_row():
    model = random_model()
    prompts = prompts_of(5, 11, 3, 1)
    alone = [model.generate([prompt], 30, seed=seed, **SAMPLED)[0] for prompt, seed in zip(prompts, (7, 7, 8, 9))]
    assert all(map(torch.equal, model.generate(prompts, 30, seed=[7, 7, 8, 9], **SAMPLED), alone))
    assert all(map(torch.equal, model.generate(prompts[::-1], 30, seed=(9, 8, 7, 7), **SAMPLED), alone[::-1]))
    assert all(map(torch.equal, model.generate(prompts[:2], 30, seed=7, **SAMPLED), alone[:2]))
    longer = model.generate(prompts, 50, seed=[7, 7, 8, 9], num_samples=2, **SAMPLED)
    assert all(torch.equal(row[: len(short)], short) for row, short in zip(longer[::2], alone))
    assert not any(torch.equal(row[: len(short)], short) for row, short in zip(longer[1::2], alone))


def test_without_a_seed_every_row_and_every_call_is_another():
    model = random_model()
    prompt = prompts_of(5)
    rows = [*model.generate(prompt * 3, 40, temperature=1.0), *model.generate(prompt, 40, temperature=1.0, num_samples=2)]
    assert len({tuple(row.tolist()) for row in rows}) == 5


def test_without_a_seed_that_of_pytorch_counts():
    model, prompts, rows = random_model(), prompts_of(5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(model.generate(prompts, 20, temperature=1.0)[0])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


# Log-probabilities


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, SAMPLED | {"seed": 3}, SAMPLED | {"seed": 3, "use_cache": False}], ids=str)
def test_logprobs_are_those_of_the_model(options):
    """Before penalty, temperature and all else: the tokens are scored again in one pass."""
    model = random_model()
    prompts = prompts_of(5, 12)
    rows, logprobs = model.generate(prompts, 20, num_samples=2, return_logprobs=True, **options)

    def scored(model, prompt, row):
        return model(row[None])[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[len(prompt) :, None])[:, 0]

    for prompt, row, actual in zip([prompts[0]] * 2 + [prompts[1]] * 2, rows, logprobs, strict=True):
        low, oracle = scored(model.float(), prompt, row), scored(model.double(), prompt, row)
        numerics.check(actual, oracle, low, dtype=torch.float32)
        assert actual.dtype == torch.float32


def test_logprobs_end_with_their_rows(ending):
    model, prompts, free, eos = ending
    options = {"eos": eos, "return_logprobs": True}
    rows, logprobs = model.generate(prompts, 30, **options)
    assert [len(row) for row in logprobs] == [len(cut(new, eos)) for new in free]
    longest = max(map(len, logprobs))
    ids = torch.tensor([prompt[-2:] for prompt in prompts])
    tokens, table = model.generate(ids, 30, **options)
    assert table.shape == (4, tokens.shape[1] - 2)
    for row, new in zip(table, tokens[:, 2:].tolist()):
        assert (row[: len(cut(new, eos))] < 0).all() and (row[len(cut(new, eos)) :] == 0).all()
    steps = list(stream(model, prompts, 30, **options))
    assert len(steps) == longest and all(torch.equal(steps[0][1][i], row[0]) for i, row in enumerate(logprobs))


def test_no_tokens_and_their_logprobs():
    model = random_model()
    ids = random_ids(model, 2, 4)
    tokens, logprobs = model.generate(ids, 0, return_logprobs=True)
    assert torch.equal(tokens, ids) and logprobs.shape == (2, 0)
    rows, logprobs = model.generate(ids.tolist(), 0, return_logprobs=True)
    assert [len(row) for row in (*rows, *logprobs)] == [4, 4, 0, 0]


# Prefill

CACHES = [{}, {"cache": "sliding", "window": 9}, {"cache": "paged", "page_size": 4}, {"cache_dtype": torch.int8}]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 16, 39])
@pytest.mark.parametrize("options", CACHES, ids=str)
def test_a_prompt_in_pieces_gives_the_same_logits(options, chunk):
    """Also of prompts that begin pieces after others, which are padding there."""
    model = random_model()
    prompts = [torch.tensor(prompt) for prompt in prompts_of(40, 5, 23)]

    def logits(prefill_chunk):
        request = Request(model, prompts, 8, Options(prefill_chunk=prefill_chunk, **options))
        return request.prefill(request.prompts), request.cache

    (actual, cache), (low, _) = logits(chunk), logits(40)
    assert cache.counts == [40, 5, 23] and cache.lengths.tolist() == [40, 5, 23]
    model.double()
    numerics.check(actual, logits(40)[0], low, dtype=torch.float32)


def test_no_piece_is_longer_than_asked_for_and_they_are_as_good_as_equal(monkeypatch):
    model, passes = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a, **k: passes.append(ids.shape[1]) or hidden(ids, *a, **k))
    for length, chunk, expected in ((65, 64, [33, 32]), (64, 64, [64]), (10, 4, [4, 4, 2]), (3, 1, [1, 1, 1])):
        passes.clear()
        model.generate(random_ids(model, 2, length), 1, prefill_chunk=chunk)
        assert passes == expected


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 4}, {"use_cache": False}, {"num_samples": 3}], ids=str)
def test_only_the_last_positions_logits_are_computed(options, monkeypatch):
    model, rows = random_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(hidden[..., 0].numel()) or logits(hidden))
    model.generate(prompts_of(30, 11), 1, **options)
    assert rows == [2]


# Errors

BAD = [
    ({"ids": "ROMEO"}, TypeError, "ids: expected a torch.Tensor or a list of prompts, got str"),
    ({"ids": [1, 2]}, TypeError, "ids: expected each prompt to be a list of integers or a 1-d tensor, got 1"),
    ({"ids": [[1, 2], "ROMEO"]}, TypeError, "ids: expected each prompt to be a list of integers .*, got 'ROMEO'"),
    ({"ids": [[1, 2.5]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[1, 2.5\]"),
    ({"ids": [[[1], [2]]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[\[1\], \[2\]\]"),
    ({"ids": [[2**70] * 90]}, TypeError, "ids: expected each prompt to be a list of integers .*, got a list"),
    ({"ids": [[1] * 97, [1]]}, ValueError, r"ids: expected prompts of at most 96 tokens \(the context\), got one of 97"),
    ({"ids": []}, ValueError, r"ids: expected at least one sequence, .* got shapes \[\]"),
    ({"ids": [[1], []]}, ValueError, r"ids: .* each of at least one token, got shapes \[\(1,\), \(0,\)\]"),
    ({"ids": [[1], [65]]}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"ids: .* each of at least one token, got shapes \[\(0,\)\]"),
    ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids: expected shape \(B, T\).*, got shape \(3,\)"),
    ({"ids": torch.zeros(1, 3, dtype=torch.int64, device="meta")}, ValueError, "ids: expected tokens on cpu, .* some on meta"),
    ({"ids": torch.zeros(1, 3)}, TypeError, "ids: expected dtype torch.int64, got torch.float32"),
    ({"ids": torch.tensor([[1, 65]])}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.tensor([[-1, 5]])}, ValueError, "ids: expected token ids from 0 to 64, got -1"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
    ({"max_new_tokens": 92}, ValueError, "max_new_tokens: expected .* context of 96 tokens, got 5 . 92"),
    ({"temperature": -0.1}, ValueError, "temperature: expected a number >= 0, got -0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a number >= 0, got nan"),
    ({"window": 0}, ValueError, "window: expected an integer >= 1 or None, got 0"),
    ({"cache": "sliding"}, ValueError, "window: expected a number of tokens for a sliding cache, got None"),
    ({"cache": "ring"}, ValueError, "cache: expected one of 'contiguous', 'sliding', 'paged', got 'ring'"),
    ({"cache_dtype": torch.int32}, TypeError, "cache_dtype: expected torch.float32 .* got torch.int32"),
    ({"page_size": 0.5}, ValueError, "page_size: expected an integer >= 1, got 0.5"),
    ({"num_samples": 0}, ValueError, "num_samples: expected an integer >= 1, got 0"),
    ({"beams": 3}, TypeError, "unexpected keyword argument 'beams'"),
    ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1 or None, got 0"),
    ({"top_p": 0.0}, ValueError, "top_p: expected 0 < top_p <= 1 or None, got 0.0"),
    ({"top_p": 1.5}, ValueError, "top_p: expected 0 < top_p <= 1 or None, got 1.5"),
    ({"min_p": 1.5}, ValueError, "min_p: expected 0 <= min_p <= 1 or None, got 1.5"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty: expected a number > 0, got 0"),
    ({"seed": -1}, ValueError, r"seed: expected integers from 0 to 2\*\*64 - 1, got -1"),
    ({"seed": "one"}, TypeError, "seed: expected an integer or a list of integers, got 'one'"),
    ({"seed": [1, 2]}, ValueError, "seed: expected one integer or 1, one for each prompt, got 2"),
    ({"eos": 65}, ValueError, "eos: expected token ids from 0 to 64, got 65"),
    ({"eos": [3, None]}, TypeError, r"eos: expected an integer or a list of integers, got \[3, None\]"),
    ({"prefill_chunk": 0}, ValueError, "prefill_chunk: expected an integer >= 1 or None, got 0"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors(change, error, message):
    model = random_model()
    arguments = {"ids": random_ids(model, 1, 5), "max_new_tokens": 4} | change
    with pytest.raises(error, match=message):
        model.generate(**arguments)
