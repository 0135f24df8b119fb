"""The cache for transformers, against its own dynamic cache."""

import copy
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from architectures import build, cache_of, generated, inputs, named_cache
from transformers import DynamicCache, GemmaConfig, MistralConfig

import fastgpt.integrations.transformers as ft
from fastgpt.integrations.transformers import cache as ft_cache
from fastgpt.integrations.transformers.cache import CROPS_TO_LENGTH
from fastgpt.integrations.transformers.deferred import EightBit
from fastgpt.ops.quantization import dequantize, quantize

WINDOW = 6
FULL, SLIDING = GemmaConfig(num_hidden_layers=2), MistralConfig(num_hidden_layers=2, sliding_window=WINDOW)
CONFIGS = pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])


@pytest.fixture(autouse=True)
def registered():
    ft.register()
    yield
    ft.unregister()


def tokens(T: int, B=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, 2, 8, generator=generator).transpose(1, 2) for _ in range(2)]


def same(actual, expected):
    for x, y in zip(actual, expected):
        assert torch.equal(x, y)


def in_step(ours, theirs, lengths):
    """Passes of so many tokens, of which both caches give the same to attend to."""
    for layer, (i, T) in itertools.product(range(2), enumerate(lengths)):
        assert ours.get_mask_sizes(T, layer) == theirs.get_mask_sizes(T, layer)
        k, v = tokens(T, seed=i)
        same(ours.update(k, v, layer), theirs.update(k, v, layer))
        assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)


@CONFIGS
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "lengths", [[1] * 300, [5, 1, 1, 2, 5, 1, 6, 1], [40, 1, 1, 9, 1], [1, 40, 40, 1], [5, 6, 7, 300, 1], [700, 1, 1]],
    ids=["ones", "few", "prompt", "prompts", "long", "longer"],
)  # fmt: skip
def test_appending(config, lengths, gradients):
    ours, theirs = ft.Cache(config), DynamicCache(config=config)
    with torch.set_grad_enabled(gradients):
        in_step(ours, theirs, lengths)


@torch.no_grad()
def test_nothing_moves():
    """Keys stay where they are until storage is full, and then move once for as many tokens; a window's likewise."""
    for config, most in ((FULL, 4), (SLIDING, 2000 // WINDOW + 2)):
        cache, places = ft.Cache(config), []
        for i in range(2000):
            keys, _ = cache.update(*tokens(1, seed=0), 0)
            places.append(keys[:, :, -1].data_ptr() - keys.element_size() * keys.stride(2) * i)
        assert len(set(places)) <= most
    assert cache.layers[0].keys.shape[2] <= 2 * WINDOW and cache.nbytes == 2 * 3 * 2 * 2 * WINDOW * 8 * 4


@torch.no_grad()
def test_fixed_length():
    cache = ft.Cache(FULL, max_cache_len=10)
    cache.update(*tokens(4), 0)
    place, size = cache.layers[0].keys.data_ptr(), cache.nbytes
    cache.update(*tokens(6), 0)
    assert (cache.layers[0].keys.data_ptr(), cache.nbytes) == (place, size) and cache.get_max_length() == 10
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match="at most 10 tokens .max_cache_len., got 10 stored . 1 new"):
        cache.update(*tokens(1), 0)
    assert torch.equal(cache.layers[0].keys, before)
    cache.reset()
    cache.update(*tokens(3), 0)
    assert cache.layers[0].keys.data_ptr() == place and cache.get_seq_length() == 3


@CONFIGS
@torch.no_grad()
def test_other_batches(config):
    """Reordered, repeated, chosen, reset and copied, and in between appended to."""
    ours, theirs = ft.Cache(config), DynamicCache(config=config)
    for lengths in ([4], [20, 1]):
        for change in (
            lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
            lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 3, 5]))),
            lambda cache: (cache.batch_repeat_interleave(3), cache.batch_select_indices(torch.arange(9) % 3 == 1)),
        ):
            for cache in ours, theirs:
                change(cache)  # of an empty cache, too
            in_step(ours, theirs, lengths)
    copied, before = copy.deepcopy(ours), ours.layers[0].keys.clone()
    in_step(copied, copy.deepcopy(theirs), [1, 2])
    assert torch.equal(ours.layers[0].keys, before)
    ours.reset()
    theirs.reset()
    k, v = tokens(5, B=2)  # of another size
    same(ours.update(k, v, 0), theirs.update(k, v, 0))


@CONFIGS
@pytest.mark.parametrize("lengths", [[3], [5, 1, 9, 4], [40, 3]])
@torch.no_grad()
def test_cropping(config, lengths):
    """As assisted generation does: tokens are tried, and some of them taken back, again and again."""
    ours, theirs = ft.Cache(config), DynamicCache(config=config)
    in_step(ours, theirs, lengths)
    for cache in ours, theirs:
        cache.activate_past_recording()
    for tried, removed in ((4, 3), (2, 0), (5, 5), (1, 1), (6, 2), (3, 1)) * 5:
        in_step(ours, theirs, [tried])
        for cache in ours, theirs:
            cache.crop(-removed)
        assert ours.get_seq_length() == theirs.get_seq_length()
    in_step(ours, theirs, [1, 2])


@torch.no_grad()
def test_cropping_overwritten_tokens_raises():
    cache = ft.Cache(SLIDING)
    cache.update(*tokens(40), 0)
    with pytest.raises(
        RuntimeError, match="tokens_to_remove: expected at most 0 tokens, since a layer with a window of 6 has 5"
    ):
        cache.layers[0].crop(-1)
    for config in FULL, SLIDING:
        cache = ft.Cache(config)
        cache.crop(-1)  # of layers that have nothing yet, as if they shared those of others
        cache.update(*tokens(5), 0)
        with pytest.raises(ValueError, match="tokens_to_remove: expected at least -5, for the 5 tokens in the cache, got -6"):
            cache.layers[0].crop(-6)
        with pytest.raises(TypeError, match="tokens_to_remove: expected an integer, got '3'"):
            cache.layers[0].crop("3")
        assert cache.get_seq_length() == 5
        if CROPS_TO_LENGTH:
            cache.layers[0].crop(3)
            assert cache.get_seq_length() == 3
        else:
            with pytest.raises(ValueError, match="tokens_to_remove: expected -n to remove n tokens, got 3"):
                cache.layers[0].crop(3)


@CONFIGS
@torch.no_grad()
def test_layers_hold_the_keys_and_values_of_transformers(config):
    """Keys and values of a layer are those of transformers' after every pass, whatever was recorded and taken back."""
    ours, theirs = ft.Cache(config), DynamicCache(config=config)

    def step(*lengths):
        in_step(ours, theirs, lengths)
        for mine, other in zip(ours.layers, theirs.layers):
            same((mine.keys, mine.values), (other.keys, other.values))

    for T in (3, 1, 9, 1):
        step(T)
    for cache in ours, theirs:
        cache.activate_past_recording()
    for tried, removed in ((4, 3), (2, 0), (5, 5), (1, 1)):
        step(tried)
        for cache in ours, theirs:
            cache.crop(-removed)
        step()


@CONFIGS
@pytest.mark.parametrize(
    "change",
    [lambda x: x * 2, lambda x: x[:, :, -3:], lambda x: x[[0, 2]], lambda x: x.repeat(2, 1, 1, 1), lambda x: x.to("cpu")],
    ids=["numbers", "fewer", "sequences", "more", "device"],
)
@torch.no_grad()
def test_assigning(config, change):
    """keys and values can be replaced one after the other, and what is replaced is what the next pass sees."""
    ours, theirs = ft.Cache(config), DynamicCache(config=config)
    in_step(ours, theirs, [4])
    for layer in (*ours.layers, *theirs.layers):
        layer.keys = change(layer.keys)
        layer.values = change(layer.values)
    for mine, other in zip(ours.layers, theirs.layers):
        same((mine.keys, mine.values), (other.keys, other.values))
        k, v = tokens(1, B=len(mine.keys))
        same(mine.update(k, v), other.update(k, v))


@torch.no_grad()
def test_half_an_assignment():
    layer = ft.Cache(FULL).layers[0]
    layer.update(*tokens(4))
    before = layer.values.clone()
    layer.keys = layer.keys[:, :, :2]
    assert layer.keys.shape[2] == 2 and torch.equal(layer.values, before)
    with pytest.raises(ValueError, match=r"values: expected an assignment of shape \(3, 2, 2\), as keys were assigned"):
        layer.update(*tokens(1))
    layer.values = before[:, :, :2]
    layer.update(*tokens(1))
    assert layer.keys.shape[2] == 3
    with pytest.raises(TypeError, match="keys: expected a torch.Tensor, got list"):
        layer.keys = [1]


@CONFIGS
@pytest.mark.parametrize(
    "indices", [(0, 2), [2, 0, 0], slice(1, None), [True, False, True], torch.tensor([1]), range(2)], ids=str
)
@torch.no_grad()
def test_selecting_sequences(config, indices):
    ours, theirs = ft.Cache(config), DynamicCache(config=config)
    in_step(ours, theirs, [4])
    for cache in ours, theirs:
        cache.batch_select_indices(indices)
    for mine, other in zip(ours.layers, theirs.layers):
        same((mine.keys, mine.values), (other.keys, other.values))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@torch.no_grad()
def test_changing_eight_bit_keys(dtype):
    """Who changes the keys that a cache returned attends to the changed ones, as with any other tensor."""
    q = torch.randn(3, 2, 1, 8)
    layer, cache = SimpleNamespace(is_causal=True, training=False), ft.Cache(FULL, cache_dtype=dtype)
    keys, values = cache.update(*tokens(5), 0)
    plain = [x.clone() for x in (keys, values)]
    for x in keys, plain[0]:
        x[:, :, 1] = 3.0
    assert torch.equal(ft.attention(layer, q, keys, values, None)[0], ft.attention(layer, q, *plain, None)[0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@CONFIGS
@torch.no_grad()
def test_eight_bits(config, dtype):
    """What is stored is what the reference makes of it, and whoever does not know of it sees numbers."""
    ours, theirs = ft.Cache(config, cache_dtype=dtype), DynamicCache(config=config)
    for T in (5, 1, 1, 6, 3):
        k, v = tokens(T, seed=T)
        actual = ours.update(k, v, 0)
        exact = [dequantize(*quantize(x, dtype)) for x in (k, v)]
        same(actual, theirs.update(*exact, 0))
        assert all(isinstance(x, EightBit) and x.codes.dtype == dtype for x in actual)
    for cache in ours, theirs:
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
    k, v = tokens(2, B=6)
    same(ours.update(k, v, 0), theirs.update(*(dequantize(*quantize(x, dtype)) for x in (k, v)), 0))
    copied = copy.deepcopy(ours)
    same((copied.layers[0].keys, copied.layers[0].values), (ours.layers[0].keys, ours.layers[0].values))


@torch.no_grad()
def test_values_of_another_head_dim():
    for dtype in (None, torch.int8):
        cache = ft.Cache(FULL, cache_dtype=dtype)
        k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 8)
        keys, values = cache.update(k, v, 0)
        expected = (k, v) if dtype is None else (dequantize(*quantize(x, dtype)) for x in (k, v))
        same((keys, values), expected)


def test_gradients_of_new_tokens():
    """Training with a cache at hand, as models have by default, computes the gradients that it does without."""
    model = build("mistral", "fastgpt")
    arguments = {"input_ids": inputs("mistral")["input_ids"]}
    gradients = []
    for options in ({"use_cache": False}, {"use_cache": True, **named_cache(ft.Cache(model.config))}):
        model.zero_grad()
        model(**arguments, **options).logits.square().sum().backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


def test_used_where_inference_mode_ended():
    model = build("llama", "fastgpt")
    ids, cache = inputs("llama")["input_ids"], ft.Cache(model.config)
    with torch.inference_mode():
        model(ids, use_cache=True, **named_cache(cache))
    with torch.no_grad():
        actual = model(ids[:, :1], use_cache=True, **named_cache(cache)).logits
        torch.testing.assert_close(actual[:, -1], model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1])


WAYS = {
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bart"])
def test_ways_to_generate(name, way):
    """The tokens of eager attention with its own cache, for the same seed."""
    model, arguments = build(name), inputs(name, "left")
    if way == "prompt lookup":
        arguments = {key: x[:1] for key, x in arguments.items()}
    results = []
    for implementation in ("eager", "fastgpt"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        results.append(
            generated(model, arguments, **WAYS[way], **({} if implementation == "eager" else {"cache": cache_of(model)}))
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_generation(name):
    """By a model that guesses wrong, so that most of what is tried is taken back."""
    model, assistant = build(name, "fastgpt"), build(name, "fastgpt")
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.1)
    arguments = {key: x[:1] for key, x in inputs(name).items()}
    expected = generated(model, arguments)
    assert torch.equal(generated(model, arguments, assistant_model=assistant, cache=cache_of(model)), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_eight_bit_generation(name):
    """The same tokens whether attention reads 8-bit rows or eager attention their numbers."""
    model, arguments = build(name), inputs(name, "left")
    expected = generated(model, arguments, cache=cache_of(model, cache_dtype=torch.int8))
    model.set_attn_implementation("fastgpt")
    with ft.record() as calls:
        actual = generated(model, arguments, cache=cache_of(model, cache_dtype=torch.int8))
    assert torch.equal(actual, expected) and calls.keys() == {"cpp"}


@pytest.mark.slow
def test_a_prompt_for_several():
    """A cache that has a prompt, copied for each text that goes on from it."""
    model = build("gemma2", "fastgpt")
    prompt = inputs("gemma2")["input_ids"][:1]
    cache = ft.Cache(model.config)
    with torch.no_grad():
        model(prompt, use_cache=True, **named_cache(cache))
    for seed in range(3):
        text = torch.cat([prompt, torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(seed))], dim=1)
        arguments = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        assert torch.equal(generated(model, arguments, cache=copy.deepcopy(cache)), generated(model, arguments))


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"max_cache_len": 0}, "max_cache_len: expected an integer >= 1 or None, got 0"),
        (TypeError, {"max_cache_len": 2.5}, "max_cache_len: expected an integer >= 1 or None, got 2.5"),
        (TypeError, {"cache_dtype": torch.float16}, "cache_dtype: expected torch.int8 or torch.float8_e4m3fn or None"),
    ],
)
def test_errors(error, options, message):
    with pytest.raises(error, match=message):
        ft.Cache(FULL, **options)


@pytest.mark.parametrize("capturing", [False, True])
def test_a_graph_that_is_captured_has_positions_of_its_own(capturing):
    """And not those that passes share, which nothing keeps once there were others."""
    k, seen = torch.randn(1, 2, 3, 8), []
    with (
        mock.patch.object(ft_cache, "kv_cache_update", lambda *args, positions, **cache: seen.append(positions)),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing),
    ):
        for _ in range(2):
            ft.Cache(FULL).update(k, k, 0)
    assert seen[0].tolist() == [[0, 1, 2]] and (seen[0] is not seen[1]) == capturing
