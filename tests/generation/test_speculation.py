"""Speculation changes no token and no bit of a log-probability; it only makes more than one token of a pass."""

import random

import pytest
import torch
from models import random_ids, random_model

import fastgpt
from fastgpt import generate, stream
from fastgpt.generation import speculation
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.decoding import Passes, decoding, most_steps
from fastgpt.generation.pipeline import pipeline
from fastgpt.generation.request import Request
from fastgpt.generation.speculation import Pace
from fastgpt.model.rope import Rope
from fastgpt.ops.linear import FEW_ROWS_BF16, FEW_ROWS_QUANTIZED, MAX_ROWS_CPU

LLAMA = {"num_kv_heads": 2, "norm": "rms", "activation": "silu", "gated": True, "position": "rotary", "rope": Rope(dim=16)}
MODELS = {
    "gpt2": {},
    "llama": LLAMA,
    "windows": LLAMA | {"windows": (None, 7)},
    "softcap": {"attention_softcap": 5.0, "logit_softcap": 3.0, "num_kv_heads": 1},
}


class Repeating(torch.nn.Module):
    """A processor that makes rows repeat themselves, with state of its own: the number of tokens."""

    def forward(self, ids, logits):
        logits[:, 3] -= 0.1 * ids.shape[1]
        return logits.scatter_add(1, ids[:, -8:], torch.full((len(ids), min(8, ids.shape[1])), 2.0))


def random_case(rng):
    """A model, prompts and options of `generate`."""
    name = rng.choice(list(MODELS))
    vocabulary = rng.choice([5, 17, 65])  # few tokens repeat themselves
    model = random_model(vocabulary=vocabulary, context=80, seed=rng.randrange(4), **MODELS[name])
    model = model.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    if rng.random() < 0.15:
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(fastgpt.quantize(module.weight, "int8"), requires_grad=False)
    period = rng.randrange(2, 9)
    prompts = [
        (random_ids(model, 1, period, seed=rng.randrange(99))[0].tolist() * 9)[: rng.randrange(1, 24)]
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))
    ]
    cache = rng.choice(["contiguous", "contiguous", "paged", "sliding"])
    options = {
        "cache": cache, "cache_dtype": rng.choice([None, None, torch.int8, torch.float8_e4m3fn]),
        "window": rng.choice([3, 6, 20]) if cache == "sliding" else rng.choice([None, None, 9]),
        "page_size": rng.choice([1, 4, 16]), "eos": rng.choice([(), (), 1, (0, 2)]), "return_logprobs": True,
        "max_new_tokens": rng.choice([1, 2, 9, 30]), "num_samples": rng.choice([1, 1, 2]),
        "temperature": rng.choice([0, 0, 0.3, 1.0]), "seed": rng.randrange(9),
    }  # fmt: skip
    for rule, value in (
        ("top_k", 3), ("top_p", 0.8), ("min_p", 0.1), ("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 5), ("logit_bias", {2: 1.5, 3: float("-inf")}), ("logits_processors", Repeating()),
    ):  # fmt: skip
        if rng.random() < 0.15:
            options[rule] = value
    draft = rng.choice(["prompt", "prompt", "prompt", "model"])
    if draft == "model":
        draft = random_model(layers=1, vocabulary=vocabulary, context=80, seed=0).to(model.first_weight.dtype)
    return model, prompts, options, {"speculate": draft, "speculate_tokens": rng.choice([None, 1, 2, 4, 7])}


def assert_same(model, prompts, options, speculation):
    expected, expected_logprobs = generate(model, prompts, **options)
    actual, logprobs = generate(model, prompts, **options, **speculation)
    for row in range(len(expected)):
        assert actual[row].tolist() == expected[row].tolist()
        assert torch.equal(logprobs[row], expected_logprobs[row])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_tokens_and_logprobs_are_those_without_speculation(seed):
    rng = random.Random(seed)
    for _ in range(20):
        assert_same(*random_case(rng))


def repeating_model(**fields):
    """Its greedy text soon repeats itself."""
    return random_model(vocabulary=17, context=200, **fields)


def tokens_per_pass(model, prompts, new, **options):
    request = Request.of(model, prompts, new, GenerationConfig.of(model, {"eos": (), **options}))
    for _ in request.run():
        pass
    return request.sampler.tokens_per_pass


def repeat(ids, logits):
    """A processor that has the token three places before come next."""
    return logits.scatter_add(1, ids[:, -3:-2], torch.full((len(ids), 1), 1e3))


def test_a_repeated_text_takes_fewer_passes():
    model, prompt = repeating_model(), [[1, 2, 3] * 9]
    options = {"speculate": "prompt", "speculate_tokens": 7, "logits_processors": repeat}
    assert tokens_per_pass(model, prompt, 89, **options) == 8
    assert tokens_per_pass(model, [*prompt, [4, 5, 6, 4, 5, 6]], 89, **options) == 8
    assert tokens_per_pass(model, prompt, 1, **options) is None


def test_a_model_that_drafts_for_itself_is_always_right():
    model, prompts = repeating_model(), [[3], [1, 2, 3]]
    for options in ({}, {"temperature": 1.0, "seed": 3, "top_k": 5}):
        rate = tokens_per_pass(model, prompts, 97, speculate=model, speculate_tokens=3, **options)
        assert rate == 4  # 96 tokens after the first


def test_drafts_that_are_not_checked_are_noticed(monkeypatch):
    """The comparisons of this file can fail: here every draft is accepted."""

    def careless(b, inputs, logits, samplers, model):
        for token in [*inputs[1:], logits[-1].argmax().item()]:
            if not samplers.done[b]:
                samplers.choose(b, torch.zeros(1, model.config.vocab_size).index_fill(1, torch.tensor([token]), 1.0))
        return len(inputs) - 1

    model, prompt = random_model(context=200), [[1, 2, 3] * 9]
    expected = generate(model, prompt, 60, speculate="prompt", speculate_tokens=7)
    monkeypatch.setattr(speculation, "check", careless)
    assert not torch.equal(generate(model, prompt, 60, speculate="prompt", speculate_tokens=7)[0], expected[0])


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8", "int4"])
@torch.inference_mode()
def test_logits_of_a_pass_have_the_bits_of_steps(weights):
    dtype = getattr(torch, weights) if hasattr(torch, weights) and not weights.startswith("int") else torch.bfloat16
    model = random_model(context=3000, width=64, **LLAMA).to(dtype)
    if weights.startswith("int"):
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(fastgpt.quantize(module.weight, weights), requires_grad=False)
    for batch, past in ((1, 5), (1, 2100), (2, 70)):  # 2100: keys are split
        ids = random_ids(model, batch, past + 8)
        steps, passes = (model.new_cache(batch) for _ in range(2))
        for cache in (steps, passes):
            model(ids[:, :past], cache)
        step, read = decoding(model, steps), Passes(model, passes)
        expected = torch.stack([step(token).clone() for token in ids[:, past:].T], dim=1)
        for T in range(1, read.most + 1):
            assert torch.equal(read(ids[:, past : past + T], [T] * batch), expected[:, :T])
            passes.truncate([past] * batch)


def test_a_pass_has_as_many_rows_as_share_their_bits():
    model = random_model(context=64)
    few = {batch: most_steps(model, model.new_cache(batch)) for batch in (1, 8, 9, MAX_ROWS_CPU + 1)}
    assert few == {1: 8, 8: min(8, MAX_ROWS_CPU // 8), 9: MAX_ROWS_CPU // 9, MAX_ROWS_CPU + 1: 1}
    model = model.bfloat16()
    assert [most_steps(model, model.new_cache(batch)) for batch in (1, 3, 5)] == [FEW_ROWS_BF16, FEW_ROWS_BF16 // 3, 1]
    assert most_steps(model, model.new_cache(1, kind="sliding", window=3)) == 3
    model.blocks[0].mlp.up.weight = torch.nn.Parameter(
        fastgpt.quantize(model.blocks[0].mlp.up.weight, "int8"), requires_grad=False
    )
    assert most_steps(model, model.new_cache(1)) == FEW_ROWS_QUANTIZED


def test_streams_yield_the_same_steps():
    model, prompts = repeating_model(), [[1, 2, 3] * 5, [4], [5, 5, 5, 5]]
    options = {"eos": 7, "temperature": 0.7, "seed": 2}
    steps = [step.tolist() for step in stream(model, prompts, 40, **options)]
    assert [step.tolist() for step in stream(model, prompts, 40, speculate="prompt", **options)] == steps


def test_texts_stop_where_they_did():
    pipe = pipeline()
    for stop in (("\n",), ("the", "e"), ()):
        expected = pipe(["ROMEO:", "A"], 80, stop=stop)
        assert pipe(["ROMEO:", "A"], 80, stop=stop, speculate="prompt") == expected
    run = pipe.start(["ROMEO:"], 80, speculate="prompt")
    run.finish()
    assert run.tokens_per_pass >= 1
    plain = pipe.start(["ROMEO:"], 80)
    plain.finish()
    assert plain.tokens_per_pass == 1


def test_logits_that_are_not_finite_raise_where_they_did():
    model, calls = repeating_model(), []

    def breaks(ids, logits):
        calls.append(1)
        return logits * (float("nan") if ids.shape[1] == 12 and ids[0, 0] == 4 else 1)

    options = {"logits_processors": breaks, "eos": ()}
    seen = []
    with pytest.raises(ValueError, match="^logits: expected finite ones .* in row 1 at step 11, after logits_processors$"):
        for step in stream(model, [[1, 2, 3] * 4, [4]], 40, speculate="prompt", **options):
            seen.append(step.tolist())
    assert len(seen) == 11


def test_later_calls_reuse_recorded_passes(monkeypatch):
    model, prompt = repeating_model(), [[1, 2, 3] * 5]
    first = generate(model, prompt, 40, speculate="prompt", speculate_tokens=2)[0]
    made = []
    monkeypatch.setattr(Passes, "_new", lambda *arguments: made.append(arguments))
    assert torch.equal(generate(model, prompt, 40, speculate="prompt", speculate_tokens=2)[0], first) and not made


def test_longrope_goes_in_step_where_its_factors_change():
    factors = tuple(1.0 + i for i in range(8))
    rope = Rope(dim=16, kind="longrope", original_context=20, short_factors=(1.0,) * 8, long_factors=factors, factor=4.0)
    model = random_model(vocabulary=17, position="rotary", rope=rope)
    for new in (8, 30):  # within the original context, and beyond it
        expected = generate(model, [[1, 2, 3] * 3], new)[0]
        assert torch.equal(generate(model, [[1, 2, 3] * 3], new, speculate="prompt", speculate_tokens=4)[0], expected)


def test_pace_follows_what_was_accepted():
    pace = Pace(8, timed=False)
    for _ in range(50):
        pace.observe("n", 0, 1)
    assert pace.best([[pace.rate("n", 0.5)]]) == 1
    for _ in range(50):
        pace.observe("n", 3, 3)
    rate = pace.rate("n", 0.5)
    assert pace.best([[rate**i for i in range(1, 8)]]) == 8
    pace = Pace(8)
    for T in (1, 2, 3, 4, 6, 8):
        pace.took(T, 100.0)  # recorded
        pace.took(T, float(T))  # a pass costs as much as its tokens
    assert pace.best([[0.9, 0.8, 0.7]]) == 1
    assert Pace(8, fixed=3).best([[0.1] * 7]) == 4


def test_bad_input_is_named():
    model = random_model()
    other = random_model(vocabulary=9)
    for options, error, message in (
        ({"speculate": "ngram"}, ValueError, "speculate: expected \"prompt\", a GPT or None, got 'ngram'"),
        ({"speculate": 3}, TypeError, "speculate: expected"),
        ({"speculate": other}, ValueError, "speculate: expected a model with the vocabulary of 65 tokens, got one of 9"),
        ({"speculate": "prompt", "use_cache": False}, ValueError, "speculate: expected None with use_cache=False"),
        ({"speculate_tokens": 3}, ValueError, "speculate_tokens: expected None without speculate, got 3"),
        ({"speculate": "prompt", "speculate_tokens": 8}, ValueError, "speculate_tokens: expected an integer"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            generate(model, [[1, 2]], 5, **options)
