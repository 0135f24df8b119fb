"""Many prompts: rows that join and leave a batch have the tokens that they would have alone, and no page is lost."""

import copy
import pickle
import random
import time

import pytest
import torch
from cuda_stub import stubbed_cuda
from family_checkpoints import CONFIGS
from generation_cases import SAMPLED, cut, prompts_of, scored
from models import random_model

import fastgpt
from fastgpt import GPT, generate, generate_each
from fastgpt.cache.storage import free_memory
from fastgpt.generation import batch_size
from fastgpt.generation.batch_size import Width, bucket
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.many import MOST_TOGETHER, Interrupted, Many
from fastgpt.generation.sampling import uniform_numbers
from fastgpt.generation.scheduler import Scheduler
from fastgpt.generation.slot_sampling import Answer
from fastgpt.testing import numerics

LENGTHS = (3, 9, 30, 2, 17, 25, 40, 11, 5, 33)
PROMPTS = prompts_of(*LENGTHS)
PROMPTS += [PROMPTS[6][:32] + prompt for prompt in PROMPTS[:4]]  # five that begin alike
NEW = [12, 1, 20, 7, 3, 16, 9, 2, 18, 5, 11, 14, 6, 10]


def alone(model, prompts, new, **options):
    """The new tokens of each prompt, generated on its own."""
    return [generate(model, [prompt], n, **options)[0][len(prompt) :].tolist() for prompt, n in zip(prompts, new)]


def new_tokens(results, prompts):
    return [row[len(prompt) :].tolist() for row, prompt in zip(results, prompts, strict=True)]


def many(model, prompts, new, num_pages=None, **options):
    """The new tokens of each prompt, and the scheduler that made them."""
    call = Many(model, prompts, new, GenerationConfig.of(model, options), num_pages=num_pages)
    results = call.finish()
    return new_tokens(results, prompts), call.scheduler


def require_no_page_is_lost(of: Scheduler):
    """Once all rows have ended, only kept beginnings have pages; without them, none is taken."""
    while of.beginnings.drop():
        pass
    statistics = of.pool.statistics()
    assert statistics["used_pages"] == statistics["tokens"] == statistics["shared_pages"] == 0
    assert statistics["sequences"] == of.slots.batch_size


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 14])
@pytest.mark.parametrize(
    "options",
    [{}, {"page_size": 1}, {"page_size": 4, "prefill_chunk": 5}, {"page_size": 4, "num_pages": 18, "prefill_chunk": 8}],
    ids=str,
)
def test_greedy_tokens_are_those_of_each_prompt_alone(options, max_batch):
    model = random_model()
    tokens, of = many(model, PROMPTS, NEW, max_batch=max_batch, **options)
    assert tokens == alone(model, PROMPTS, NEW)
    assert of.preemptions > 0 or max_batch < 3 or "num_pages" not in options
    require_no_page_is_lost(of)


@pytest.mark.parametrize(
    "options",
    [
        SAMPLED | {"seed": 3},
        {"temperature": 1.0, "seed": 5, "min_new_tokens": 4, "eos": [1, 2, 3, 4, 5, 6, 7]},
        {"repetition_penalty": 1.3, "logit_bias": {3: 2.0, 7: float("-inf")}},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 2, "temperature": 1.2, "seed": 1, "min_new_tokens": 3, "eos": [1, 2, 3, 4]},
        {"logits_processors": [lambda tokens, logits: logits - tokens.sum() % 7 * torch.arange(logits.shape[1]) / 64]},
        {"window": 12},
    ],
    ids=lambda options: ", ".join(options),
)
def test_rules_are_those_of_each_prompt_alone(options):
    model = random_model()
    expected = alone(model, PROMPTS, NEW, **options)
    for settings in ({"max_batch": 4}, {"max_batch": 6, "page_size": 4, "num_pages": 20, "prefill_chunk": 6}):
        tokens, of = many(model, PROMPTS, NEW, **settings, **options)
        assert tokens == expected
        require_no_page_is_lost(of)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_caches_of_8_bits(cache_dtype):
    """Alone in pages, too; read in one piece: what is rounded depends on nothing else."""
    model = random_model()
    prompts, new = PROMPTS[:8], NEW[:8]
    tokens, _ = many(model, prompts, new, max_batch=3, cache_dtype=cache_dtype)
    assert tokens == alone(model, prompts, new, cache="paged", cache_dtype=cache_dtype)


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_families(case, tmp_path):
    from family_checkpoints import theirs

    theirs(case).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    prompts, new = PROMPTS[:8], NEW[:8]
    longest = max(len(prompt) + n for prompt, n in zip(prompts, new))
    if model.rope_factors_change(1, longest):
        prompts, new = prompts[:2], new[:2]
    tokens, of = many(model, prompts, new, max_batch=3, page_size=4, eos=None)
    assert tokens == alone(model, prompts, new, eos=None)
    require_no_page_is_lost(of)


@pytest.mark.parametrize("page_size", [1, 4])
def test_on_a_gpu_steps_are_captured_once_for_each_number_of_slots(page_size):
    model = random_model()
    with stubbed_cuda() as stub:
        tokens, of = many(model, PROMPTS, NEW, max_batch=5, page_size=page_size)
    assert tokens == alone(model, PROMPTS, NEW)
    captures = stub.calls.count("capture_begin")
    assert 1 <= captures <= len(of.passes) and set(of.passes) <= {1, 2, 4, 5}
    assert stub.calls.count("replay") == of.steps - len(of.passes)  # the first of each number runs eagerly
    assert not {"synchronize", "empty_cache"} & set(stub.calls)


def test_rows_end_at_eos_and_others_take_their_place(ending):
    model, prompts, free, eos = ending
    tokens, of = many(model, prompts * 3, 30, max_batch=3, eos=eos)
    assert tokens == [cut(row, eos) for row in free] * 3
    assert of.steps < 3 * 4 * 30 / 3  # the slots of rows that ended were used


def test_samples_and_log_probabilities_are_those_of_a_plain_call():
    model, options = random_model(), {"temperature": 0.9, "seed": list(range(4)), "num_samples": 3, "return_logprobs": True}
    prompts = PROMPTS[:4]
    expected, _ = generate(model, prompts, 9, **options)
    tokens, logprobs = generate(model, prompts, 9, max_batch=5, **options)
    assert [row.tolist() for row in tokens] == [row.tolist() for row in expected]
    exact = model.double()
    for i, (row, actual) in enumerate(zip(tokens, logprobs, strict=True)):
        numerics.check(actual, lambda: scored(exact, prompts[i // 3], row))


def test_a_table_of_ids_gives_a_table_padded_with_eos(ending):
    model, prompts, free, eos = ending
    ids, exact = torch.tensor([prompt[-2:] for prompt in prompts]), copy.deepcopy(model).double()
    for options in ({}, {"eos": eos}, {"eos": eos, "return_logprobs": True}):
        plain, batched = generate(model, ids, 20, **options), generate(model, ids, 20, max_batch=3, **options)
        if "return_logprobs" in options:
            logprobs, plain, batched = batched[1], plain[0], batched[0]
            for row, actual, prompt in zip(batched, logprobs, ids):
                end = len(cut(row[2:].tolist(), eos))
                numerics.check(actual[:end], lambda: scored(exact, prompt, row[: 2 + end]))
                assert not actual[end:].any()
        assert torch.equal(plain, batched)


def test_rows_come_when_they_end_and_results_in_order():
    model = random_model()
    rows = dict(generate_each(model, PROMPTS, NEW, max_batch=4))
    order = [index for index, _ in generate_each(model, PROMPTS, NEW, max_batch=4)]
    assert sorted(rows) == list(range(len(PROMPTS))) and order != sorted(order)
    results = generate(model, PROMPTS, NEW)
    assert all(torch.equal(rows[index], result) for index, result in enumerate(results))
    index, tokens, logprobs = next(generate_each(model, PROMPTS, NEW, max_batch=2, return_logprobs=True))
    assert len(logprobs) == len(tokens) - len(PROMPTS[index]) == NEW[index]


def test_no_new_tokens():
    model = random_model()
    results = generate(model, PROMPTS[:3], [0, 4, 0])
    assert [len(row) for row in results] == [3, 13, 30]
    assert [row.tolist() for row in generate(model, PROMPTS[:2], 0, max_batch=1)] == PROMPTS[:2]


def test_two_runs_give_the_same_tokens():
    model = random_model()
    runs = [many(model, PROMPTS, NEW, temperature=1.0, seed=2, page_size=4, num_pages=24, max_batch=9)[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_seeds_come_from_the_generator_of_torch_as_in_a_plain_call():
    model, results = random_model(), []
    for options in ({}, {"max_batch": 2}):
        torch.manual_seed(11)
        results.append([row.tolist() for row in generate(model, PROMPTS[:4], 8, temperature=1.0, **options)])
    assert results[0] == results[1]


def test_many_prompts_of_their_own_lengths_are_scheduled_by_default():
    model = random_model()
    prompts = [PROMPTS[i % len(PROMPTS)][: 1 + i % 7] for i in range(MOST_TOGETHER + 6)]
    results = generate(model, prompts, 5)
    assert new_tokens(results, prompts) == alone(model, prompts, [5] * len(prompts))


def test_an_equal_beginning_is_read_once():
    model = random_model(context=96)
    read, hidden = [], model.hidden

    def counted(ids, cache, new=None, **options):
        read.append(sum(new) if new else ids.numel())
        return hidden(ids, cache, new, **options)

    model.hidden = counted
    beginning = PROMPTS[6]  # of 40 tokens
    prompts = [beginning + [i, i + 1] for i in range(6)]
    tokens, of = many(model, prompts, 4, max_batch=4, page_size=8)
    del model.hidden
    assert sum(read) == 42 + 5 * 2 and tokens == alone(model, prompts, [4] * 6)
    require_no_page_is_lost(of)


@pytest.mark.slow
def test_the_second_prompt_with_the_same_512_tokens_begins_five_times_sooner():
    """By a CPU's time on one thread, from when a prompt's turn comes to its first token."""
    model = random_model(layers=4, width=128, context=640).eval()
    beginning = torch.randint(65, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(5):
            times = [time.thread_time()]

            def first(row, token, times=times):
                times.append(time.thread_time())
                return True

            prompts = [beginning + [1, 2, 3], beginning + [4, 5, 6]]
            Many(model, prompts, 1, GenerationConfig.of(model, {"max_batch": 1}), ends=first).finish()
            ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    finally:
        torch.set_num_threads(threads)
    assert max(ratios) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_lose_no_page_and_change_no_token(seed):
    """2,500 operations each: joins, leaves, preemptions, shared beginnings, in a pool that is often too small."""
    draw, model = random.Random(seed), random_model(layers=1, heads=1, width=16, vocabulary=50, context=96)
    operations, round = 0, 0
    known = {}  # tokens of a row alone
    while operations < 2500:
        round += 1
        starts = [[draw.randrange(50) for _ in range(draw.randrange(1, 40))] for _ in range(3)]
        prompts = [
            draw.choice(starts)[: draw.randrange(1, 40)] + [draw.randrange(50) for _ in range(draw.randrange(1, 12))]
            for _ in range(draw.randrange(5, 40))
        ]
        new = [draw.randrange(0, 30) for _ in prompts]
        page = draw.choice([1, 2, 3, 8, 16])
        largest = max(-(-(len(prompt) + n) // page) for prompt, n in zip(prompts, new))
        options = GenerationConfig.of(
            model,
            {"max_batch": draw.randrange(1, 12), "page_size": page, "prefill_chunk": draw.choice([1, 7, 64]), "eos": [0, 1]},
        )
        rows = [Answer(i, torch.tensor(prompt), n) for i, (prompt, n) in enumerate(zip(prompts, new))]
        of = Scheduler(
            model, rows, options, ends=lambda row, token: token == 2, num_pages=draw.randrange(largest, 3 * largest + 1)
        )
        for _ in of.run():
            statistics = of.pool.statistics()
            held = of.slots.counts + (of.reading[1].counts if of.reading else [])
            kept = sum(map(len, of.beginnings.kept.values()))
            assert statistics["tokens"] == sum(held) + kept
            assert of.slots.counts[len(of.rows) :] == [0] * (of.slots.batch_size - len(of.rows))
        for row in rows:
            key = (tuple(row.prompt.tolist()), row.most)
            if key not in known:
                full = generate(model, [row.prompt], row.most, eos=[0, 1])[0][len(row.prompt) :].tolist()
                known[key] = cut(full, 2)
            assert row.tokens == known[key]
        operations += 2 * len(rows) + of.preemptions + of.steps
        require_no_page_is_lost(of)


def test_a_row_that_waits_again_keeps_its_tokens():
    model = random_model()
    prompts, new = PROMPTS[2:8], [30] * 6
    tokens, of = many(model, prompts, new, max_batch=6, page_size=4, num_pages=24)
    assert of.preemptions >= 3 and tokens == alone(model, prompts, new)


def test_slots_beyond_the_rows_store_nothing():
    """Three rows in a pass of four slots: the pages that the fourth one's table names are not written."""
    model = random_model()
    rows = [Answer(i, torch.tensor(PROMPTS[i]), 8 - 2 * i) for i in range(4)]
    of = Scheduler(model, rows, GenerationConfig.of(model, {"max_batch": 4}), num_pages=40)
    of.slots.block_table.fill_(39)  # a page that nobody gets
    for x in of.slots.storage.tensors():
        x.fill_(7.0)
    for _ in of.run():
        pass
    assert all((x[:, 39] == 7.0).all() for x in of.slots.storage.tensors())
    assert 4 in of.passes


def test_ctrl_c_keeps_what_is_done(monkeypatch):
    model, steps = random_model(), []

    def interrupted(self, step=Scheduler.step):
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Scheduler, "step", interrupted)
    with pytest.raises(Interrupted, match="of 14 are done") as caught:
        generate(model, PROMPTS, NEW, max_batch=4)
    monkeypatch.undo()
    results, expected = caught.value.results, generate(model, PROMPTS, NEW)
    done = [result is not None for result in results]
    assert 0 < sum(done) < len(PROMPTS) and isinstance(caught.value, KeyboardInterrupt)
    assert all(result is None or torch.equal(result, other) for result, other in zip(results, expected, strict=True))


def test_a_progress_bar_counts_rows(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    generate(random_model(), PROMPTS, NEW, progress=True)
    assert "14/14" in capsys.readouterr().err
    generate(random_model(), PROMPTS, NEW)
    assert capsys.readouterr().err == ""


def test_logits_that_are_not_finite_raise_with_the_row():
    model = random_model(tie_embeddings=False)
    with torch.no_grad():
        model.token_embedding.weight[9] = float("nan")
    with pytest.raises(ValueError, match=r"^logits: expected finite ones to choose a token by, got nan in row 2 at step 0$"):
        generate(model, [[1, 2], [3], [9, 4], [5]], 6, max_batch=2)


def test_a_model_in_training_mode_generates_without_dropout():
    model = random_model(dropout=0.5).train()
    assert many(model, PROMPTS, NEW, max_batch=5)[0] == alone(model.eval(), PROMPTS, NEW)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_new_tokens": [1, 2]}, r"max_new_tokens: expected one integer or 3, one for each prompt, got 2"),
        ({"max_new_tokens": [1, 2, -1]}, r"max_new_tokens: expected an integer >= 0 or None, got -1"),
        (
            {"max_new_tokens": [1, 2, 90]},
            r"max_new_tokens: expected at most 66 after a prompt of 30 tokens in a context of 96, got 90",
        ),
        ({"max_batch": 0}, r"max_batch: expected an integer >= 1"),
        ({"max_batch": 2, "use_cache": False}, r"use_cache: expected True where rows join and leave"),
        ({"max_batch": 2, "cache": "sliding", "window": 9}, r"cache: expected contiguous or paged where rows join"),
        ({"max_batch": 2, "speculate": "prompt"}, r"speculate: expected None where rows join"),
        ({"max_new_tokens": [1, 2, 3], "speculate": "prompt"}, r"speculate: expected None where rows join"),
        ({"max_batch": 2, "seed": [1]}, r"seed: expected one integer or 3, one for each prompt, got 1"),
        ({"max_batch": 2, "encoder_states": torch.zeros(3, 1, 64)}, r"encoder_states: expected None for a model without"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model(), PROMPTS[:3], **({"max_new_tokens": 4} | change))


def test_streams_and_tables_refuse_what_is_for_many_prompts():
    model = random_model()
    with pytest.raises(ValueError, match=r"^max_batch: expected None where all rows begin together, got 2$"):
        fastgpt.stream(model, PROMPTS[:3], 4, max_batch=2)
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected an integer for ids \(B, T\)"):
        generate(model, torch.tensor([[1, 2], [3, 4]]), [1, 2])
    with pytest.raises(ValueError, match=r"^num_pages: expected room for a row of 49 tokens, got 3 pages of 16$"):
        Scheduler(model, [Answer(0, torch.tensor(PROMPTS[2]), 20)], GenerationConfig.of(model, {}), num_pages=3)


def test_longrope_rows_of_both_kinds_are_refused(tmp_path):
    from family_checkpoints import theirs

    theirs("phi3, longrope").save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="^ids: expected prompts and answers on one side"):
        generate(model, [PROMPTS[0], PROMPTS[2] * 2], 10, max_batch=2)


def test_buckets_are_few_and_large_enough():
    assert all(n <= bucket(n, 256) <= 256 and bucket(n, n) == n for n in range(1, 257))
    assert len({bucket(n, 64) for n in range(1, 65)}) == 11 and len({bucket(n, 256) for n in range(1, 257)}) == 17


@pytest.mark.parametrize(
    "cost, expected",
    [(lambda n: 1 + 0.01 * n, 64), (lambda n: n, 64), (lambda n: n**2, 16), (lambda n: n if n < 64 else 2 * n, 32)],
)
def test_the_batch_grows_as_long_as_that_yields_no_fewer_tokens_per_second(cost, expected):
    width, fixed = Width(64, fixed=False), Width(64, fixed=True)
    for _ in range(100):
        for of in (width, fixed):
            of.took(of.now, cost(of.now))
    assert width.now == expected and fixed.now == 64


def test_a_batch_that_did_not_grow_on_a_busy_machine_grows_later():
    width = Width(64, fixed=False)
    for step in range(200):
        width.took(width.now, 10.0 if 5 <= step < 30 else 1.0)
    assert width.now == 64


def test_the_pool_takes_half_of_the_free_memory_at_most(monkeypatch):
    model = random_model()
    assert free_memory(torch.device("cpu")) > 1 << 20
    rows = [Answer(i, torch.tensor(prompt), n) for i, (prompt, n) in enumerate(zip(PROMPTS, NEW))]
    options = GenerationConfig.of(model, {"max_batch": 14})
    page_bytes = 2 * 2 * 4 * 16 * 16 * 4  # keys and values, layers, heads, tokens, head dim, fp32
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 2 * 10 * page_bytes * 1.07)
    of = Scheduler(model, rows, options)
    assert of.pool.storage.nbytes <= 10.7 * page_bytes and of.pool.statistics()["num_pages"] in (9, 10)
    for _ in of.run():
        pass
    assert [row.tokens for row in rows] == alone(model, PROMPTS, NEW)


def test_uniform_numbers_of_rows_are_those_of_a_batch():
    assert uniform_numbers([3], 2, 5).t().tolist() == uniform_numbers([1, 3], 2, 9)[:5, 2:].t().tolist()


def test_what_cannot_join_and_leave_begins_together_where_nobody_asks_for_more():
    model, prompts = random_model(), [[1 + i % 60] for i in range(70)]
    assert len(generate(model, prompts, 3, speculate="prompt")) == len(generate(model, prompts, 3, use_cache=False)) == 70
    crossed = random_model(cross_attention=True)
    states = torch.randn(70, 4, crossed.config.hidden_size)
    assert len(generate(crossed, prompts, 3, encoder_states=states)) == 70
    with pytest.raises(ValueError, match=r"^model: expected one without cross-attention, .* where rows join and leave"):
        generate(crossed, prompts, 3, encoder_states=states, max_batch=8)
    with pytest.raises(ValueError, match="^encoder_lengths: expected None without encoder_states"):
        generate(model, prompts, 3, encoder_lengths=[1] * 70, max_batch=8)


def test_new_tokens_by_default_are_as_many_as_fit_after_the_longest_of_any_number_of_prompts():
    model = random_model()
    few, several = ([[1]] * n + [PROMPTS[2]] for n in (3, 70))
    lengths = [len(row) for row in generate(model, several)]
    assert set(lengths[:70]) == {len(generate(model, few)[0])} and lengths[70] == model.config.context_length


def test_interrupted_survives_pickling():
    copy = pickle.loads(pickle.dumps(fastgpt.Interrupted([1, None])))
    assert copy.results == [1, None] and str(copy) == "1 of 2 are done"
