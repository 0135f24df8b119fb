"""An encoder and a decoder as one model: the published Transformer, biases by positions, training and generation."""

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import fastgpt
from fastgpt import GPT, Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig, GPTConfig, SlidingCache
from fastgpt.model.relative_bias import RelativeBias, buckets
from fastgpt.model.rope import Rope, sinusoidal
from fastgpt.testing import numerics

LENGTHS = [9, 1, 5]
IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
RELATIVE = {"position": "relative", "relative_buckets": 8, "relative_max_distance": 12}
ROTARY = {"position": "rotary", "rope": Rope(8)}


def configured(*, vocabulary=40, context=64, width=32, heads=4, layers=2, share=True, decoder=None, **fields):
    sizes = dict(vocab_size=vocabulary, context_length=context, num_layers=layers, num_heads=heads, hidden_size=width)
    encoder = EncoderConfig(**sizes, embedding_norm=False, norm_eps=1e-5, **fields)
    of_decoder = sizes | {"cross_attention": True} | fields | (decoder or {})
    return EncoderDecoderConfig(encoder, GPTConfig(**of_decoder), start_token=2, share_embedding=share)


# Post-norm, ReLU, sinusoidal positions, scaled embeddings; the same with norms first; and others.
PUBLISHED = {"position": "sinusoidal", "norm_first": False, "activation": "relu", "embedding_scale": math.sqrt(32)}
MODELS = {
    "published": PUBLISHED,
    "norms first": PUBLISHED | {"norm_first": True},
    "relative": RELATIVE | {"norm_first": True, "norm": "rms", "gated": True},
    "relative, post-norm, groups": RELATIVE | {"norm_first": False, "num_kv_heads": 2, "share": False},
    "rotary": ROTARY | {"norm_first": True, "activation": "silu"},
    "learned": {"norm_first": False, "decoder": {"tie_embeddings": False}},
}


def new_model(case, seed=0):
    """In evaluation mode, with weights large enough that tokens depend on the context."""
    torch.manual_seed(seed)
    model = EncoderDecoder(configured(**MODELS[case])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                if model.config.decoder.norm_first:
                    parameter.mul_(1 if "embedding" in name else 20)
                else:  # what is added is as large as the normalized stream; most comes from the inputs
                    parameter.mul_(40 if "cross_attention.out" in name else 4 if "mlp" in name else 20)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# The blocks


def pytorch_layers(model):
    """nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with the weights of the first blocks."""
    config = model.config.decoder
    options = dict(batch_first=True, norm_first=config.norm_first, activation="relu", dropout=0.0, dtype=torch.float64)
    layers = [cls(32, 4, 128, **options).eval() for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)]
    for layer, block in zip(layers, (model.encoder.blocks[0], model.decoder.blocks[0])):
        cross = block.cross_attention
        pairs = [
            (layer.self_attn.in_proj_weight, block.attention.qkv.weight), (layer.self_attn.in_proj_bias, block.attention.qkv.bias),
            (layer.self_attn.out_proj.weight, block.attention.out.weight), (layer.self_attn.out_proj.bias, block.attention.out.bias),
            (layer.linear1.weight, block.mlp.up.weight), (layer.linear1.bias, block.mlp.up.bias),
            (layer.linear2.weight, block.mlp.down.weight), (layer.linear2.bias, block.mlp.down.bias),
        ]  # fmt: skip
        norms = [block.attention_norm, block.cross_attention_norm, block.mlp_norm]
        for i, norm in enumerate([norm for norm in norms if norm is not None], 1):
            pairs += [(getattr(layer, f"norm{i}").weight, norm.weight), (getattr(layer, f"norm{i}").bias, norm.bias)]
        if cross is not None:
            pairs += [
                (layer.multihead_attn.in_proj_weight, torch.cat([cross.q.weight, cross.kv.weight])),
                (layer.multihead_attn.in_proj_bias, torch.cat([cross.q.bias, cross.kv.bias])),
                (layer.multihead_attn.out_proj.weight, cross.out.weight), (layer.multihead_attn.out_proj.bias, cross.out.bias),
            ]  # fmt: skip
        for theirs, ours in pairs:
            theirs.data.copy_(ours)
    return layers


@torch.no_grad()
@pytest.mark.parametrize("case", ["published", "norms first"])
def test_blocks_are_those_of_pytorch(case, monkeypatch):
    """With the norm after each addition, or before attention and MLP; from embeddings that are scaled and have their positions."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # one operation, whose roundings nobody sees
    model = new_model(case)
    config = model.config
    encoder_layer, decoder_layer = pytorch_layers(model)
    (table,) = sinusoidal(64, 32)

    def oracle():
        embedding = model.encoder.token_embedding.weight.double()
        x = embedding[IDS] * config.encoder.embedding_scale + table[:9]
        padding = torch.arange(9) >= torch.tensor(LENGTHS)[:, None]
        states = encoder_layer(x, src_key_padding_mask=padding)
        y = embedding[TARGET] * config.encoder.embedding_scale + table[:7]
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        return states[~padding], decoder_layer(y, states, tgt_mask=hidden, memory_key_padding_mask=padding)

    with numerics.only_double_precision():
        yardstick = numerics.simulate(oracle, arithmetic=torch.float32)
    model.encoder.blocks, model.decoder.blocks = model.encoder.blocks[:1], model.decoder.blocks[:1]
    model.encoder.norm = None  # that after the last block
    states = model.encode(IDS, LENGTHS)
    assert (model.decoder.norm is None) == (case == "published")
    model.decoder.norm = None
    _, outputs = model.decoder(TARGET, encoder_states=states, encoder_lengths=LENGTHS, output_hidden_states=True)[1]
    numerics.check((states[torch.arange(9) < torch.tensor(LENGTHS)[:, None]], outputs), yardstick)


# Biases by positions


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("number, most", [(32, 128), (10, 24), (4, 3), (7, 40)])
def test_buckets(number, most, causal):
    """The distances of each bucket, by the definition: below `exact` each has one, then ranges grow by a constant factor."""
    (found,) = buckets(600, number=number, max_distance=most, causal=causal)
    for offset, bucket in zip(range(-300, 300), found.tolist()):
        n = number if causal else number // 2
        first = n if offset > 0 and not causal else 0
        distance = abs(offset) if offset < 0 or not causal else 0
        exact = n // 2
        if distance < exact:
            assert bucket == first + distance
            continue
        place = exact + math.log(distance / exact) / math.log(most / exact) * (n - exact)
        assert min(math.floor(place - 1e-4), n - 1) <= bucket - first <= min(math.floor(place + 1e-4), n - 1)
    unused = set() if causal else {number // 2}  # of keys after the query at distance 0
    assert set(found.tolist()) == set(range(number if causal else number // 2 * 2)) - unused


def test_the_bias_is_looked_up_by_distance():
    config = GPTConfig(40, 64, 1, 4, 32, **RELATIVE)
    module = RelativeBias(config)
    nn.init.normal_(module.weight)
    positions = torch.tensor([[0, 3], [6, 11]])
    bias = module(positions, 12)
    (of_offsets,) = buckets(200, number=8, max_distance=12, causal=True)
    for b in range(2):
        for i in range(2):
            for j in range(12):
                expected = module.weight[of_offsets[100 + j - positions[b, i]]]
                assert torch.equal(bias[b, :, i, j], expected)
    assert torch.equal(module(torch.arange(12), 12)[0, :, 6], bias[1, :, 0])
    assert module(torch.arange(2000), 2000).shape == (1, 4, 2000, 2000)  # tables grow


@torch.no_grad()
@pytest.mark.parametrize("cache", [{}, {"kind": "paged", "page_size": 4}, {"cache_dtype": torch.float8_e4m3fn}], ids=str)
@pytest.mark.parametrize("window", [None, 6])
def test_a_decoder_with_relative_positions(cache, window):
    """Ragged prompts, their pieces and decode steps, also those recorded, have the logits of a pass without a cache."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 64, 2, 4, 32, **RELATIVE, windows=window and (None, window))).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.mul_(30 if "relative" in name else 8)
    ids = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(3))
    expected, exact = model(ids), copy.deepcopy(model).double()
    quantized = "cache_dtype" in cache

    def check(found, part):
        """part: of the logits of all tokens."""
        if quantized:
            torch.testing.assert_close(found, part(expected), rtol=0.3, atol=0.3)
        else:
            numerics.check(found, lambda: part(exact(ids)))

    kept = model.new_cache(2, 40, **cache)
    padded = torch.stack([torch.cat([ids[0, :4], ids[0, 4:10]]), torch.cat([torch.zeros(4, dtype=torch.int64), ids[1, :6]])])
    found = model(padded, kept, [10, 6])
    if not quantized:
        check(found[0], lambda logits: logits[0, :10])
        check(found[1, 4:], lambda logits: logits[1, :6])
    step = fastgpt.decoding(model, kept)
    for t in range(8):
        logits = step(torch.stack([ids[0, 10 + t], ids[1, 6 + t]]))
        check(logits, lambda logits, t=t: torch.stack([logits[0, 10 + t], logits[1, 6 + t]]))
    assert step.recording.is_recorded and step.recording.refused is None
    for options in ({}, {"cache": "paged"}, {"use_cache": False}, {"speculate": "prompt"}, {"prefill_chunk": 3}):
        rows = fastgpt.generate(model, [ids[0, :9].tolist(), [5]], 20, **options)
        if not options:
            first = rows
        assert all(torch.equal(*pair) for pair in zip(rows, first)), options
    assert all(torch.equal(*pair) for pair in zip(fastgpt.generate(model, [ids[0, :9].tolist(), [5]], 20, max_batch=2), first))


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "fields", [RELATIVE, RELATIVE | {"windows": (3, None)}, PUBLISHED, ROTARY, {}], ids=lambda fields: str(list(fields))
)
def test_an_encoder_is_a_decoder_without_a_causal_mask(fields, norm_first):
    """Packed sequences have the states of padded ones."""
    torch.manual_seed(0)
    config = configured(**fields | {"norm_first": norm_first}).encoder
    encoder = Encoder(config).eval()
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    decoder = GPT(GPTConfig(**own)).eval()
    for name, parameter in encoder.named_parameters():
        parameter.mul_(20 if "relative" in name else 8 if parameter.dim() > 1 else 1)
    decoder.load_state_dict(encoder.state_dict())
    found, expected, exact = encoder.encode(IDS, LENGTHS), decoder.encode(IDS, LENGTHS), copy.deepcopy(decoder).double()
    for b, n in enumerate(LENGTHS):
        alone = functools.partial(lambda b, n: exact.encode(IDS, LENGTHS)[b, :n], b, n)
        numerics.check(found[b, :n], alone), numerics.check(expected[b, :n], alone)


def test_caches_that_cannot_serve_it_are_refused():
    model = GPT(GPTConfig(40, 64, 2, 4, 32, **RELATIVE)).eval()
    with pytest.raises(ValueError, match="cache: expected a contiguous or a paged one .* got a sliding one"):
        model.new_cache(1, window=8, kind="sliding")
    for window in (8, None):
        with pytest.raises(ValueError, match="cache: expected a contiguous or a paged one"):
            fastgpt.generate(model, [[1]], 3, cache="sliding", window=window)
    cache = SlidingCache(batch_size=1, window=8, num_layers=2, num_kv_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="cache: expected a contiguous or a paged one"):
        model(IDS[:1], cache)
    assert cache.counts == [0]
    cache.extend(1)
    with pytest.raises(ValueError, match="bias: expected None in a sliding cache"):
        cache.attend(0, *torch.randn(3, 1, 4, 1, 8), bias=torch.zeros(1, 4, 1, 1))


def test_no_gradient_passes_through_a_cache():
    model = GPT(GPTConfig(40, 64, 1, 4, 32, **RELATIVE)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.relative_bias.weight)
    for tokens in (1, 9):
        with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
            model(IDS[:1, :tokens], model.new_cache(1)).sum().backward()
    model(IDS).sum().backward()
    assert model.relative_bias.weight.grad.abs().max() > 0


# The model


@torch.no_grad()
@pytest.mark.parametrize("case", MODELS)
def test_padding_does_not_matter(case):
    model = new_model(case)
    together, exact = model(IDS, TARGET, LENGTHS), copy.deepcopy(model).double()
    for b, n in enumerate(LENGTHS):
        alone = IDS[b : b + 1, :n], TARGET[b : b + 1]
        oracle = functools.partial(lambda *inputs: exact(*inputs)[0], *alone)
        numerics.check(model(*alone)[0], oracle), numerics.check(together[b], oracle)
    assert (model(IDS, TARGET) - together).abs().max() > 1e-3


@pytest.mark.parametrize("case", MODELS)
def test_generation(case):
    """What is generated is what passes over all tokens say, greedily; in every cache, and speculating, the same; samples by a seed."""
    model = new_model(case)
    inputs = [row[:n].tolist() for row, n in zip(IDS, LENGTHS)]
    rows = fastgpt.generate(model, inputs, 12)
    for row, given in zip(rows, inputs):
        assert row[0] == 2 and len(row) == 13
        logits = model(torch.tensor([given]), row[None, :-1])[0]
        assert torch.equal(logits.argmax(-1), row[1:])
    assert len({tuple(row.tolist()) for row in rows}) >= 2  # that depends on the input
    for options in ({"cache": "paged", "page_size": 4}, {"use_cache": False}, {"speculate": "prompt"}, {"prefill_chunk": 1}):
        assert all(torch.equal(*pair) for pair in zip(fastgpt.generate(model, inputs, 12, **options), rows)), options
    table = fastgpt.generate(model, IDS, 12, encoder_lengths=LENGTHS)
    assert torch.equal(table, torch.stack(rows))
    assert torch.equal(torch.stack(list(fastgpt.stream(model, inputs, 12)), 1), table[:, 1:])
    samples = [
        fastgpt.generate(model, inputs, 12, temperature=1.5, seed=4, num_samples=2, **options)
        for options in ({}, {"cache": "paged"}, {"use_cache": False})
    ]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*samples))
    assert len(samples[0]) == 6 and not torch.equal(samples[0][0], samples[0][1])
    end = rows[0][3].item()
    ended = fastgpt.generate(model, inputs[:1], 12, eos=end)[0].tolist()
    assert ended == rows[0].tolist()[: 2 + rows[0].tolist()[1:].index(end)]  # the start token ends nothing
    model.train()
    assert torch.equal(fastgpt.generate(model, IDS, 12, encoder_lengths=np.array(LENGTHS)), table)  # without dropout


def test_generation_by_hand():
    """A cache with the states of the inputs, read once."""
    model = new_model("relative")
    with torch.no_grad():
        states = model.encode(IDS, LENGTHS)
        cache = model.decoder.new_cache(3, 13, encoder_states=states, encoder_lengths=LENGTHS)
        token, rows = torch.full((3, 1), 2), []
        for _ in range(12):
            token = model.decoder(token, cache)[:, -1:].argmax(-1)
            rows.append(token)
    assert torch.equal(torch.cat(rows, 1), fastgpt.generate(model, IDS, 12, encoder_lengths=LENGTHS)[:, 1:])


@pytest.mark.parametrize("case", MODELS)
def test_saved_and_loaded(case, tmp_path):
    model = new_model(case)
    model.generation_defaults = {"eos": [1], "max_new_tokens": 5}
    model.save_pretrained(tmp_path)
    again = EncoderDecoder.from_pretrained(tmp_path)
    assert again.config == model.config and again.generation_defaults == model.generation_defaults
    assert (again.encoder.token_embedding is again.decoder.token_embedding) == model.config.share_embedding
    assert torch.equal(again(IDS, TARGET, LENGTHS), model(IDS, TARGET, LENGTHS))
    assert fastgpt.generate(again, IDS).shape == fastgpt.generate(model, IDS, 5, eos=1).shape


# Training


def test_the_loss_is_that_of_the_labels():
    """Each label is predicted from the start token and the labels before it; padding does not count."""
    model = new_model("published")
    labels = TARGET.clone()
    labels[1, 3:] = -100
    loss = model.loss(IDS, labels, LENGTHS)
    assert torch.equal(model.shifted(labels)[:, 0], torch.full((3,), 2)) and torch.equal(
        model.shifted(labels)[0, 1:], TARGET[0, :-1]
    )
    exact = copy.deepcopy(model).double()

    def mean():
        terms = []
        for b, n in enumerate(LENGTHS):
            real = labels[b][labels[b] >= 0]
            given = torch.cat([torch.tensor([2]), real[:-1]])
            logprobs = exact(IDS[b : b + 1, :n], given[None])[0].log_softmax(-1)
            terms.append(-logprobs[torch.arange(len(real)), real])
        return torch.cat(terms).mean()

    numerics.check(loss.detach(), mean)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("case", ["relative", "relative, post-norm, groups"])
def test_gradients_of_the_bias(case):
    """Against differences of the loss in double precision, for both stacks."""
    model = new_model(case).double()
    for stack in (model.encoder, model.decoder):
        weight = stack.relative_bias.weight
        gradient = torch.autograd.grad(model.loss(IDS, TARGET, LENGTHS), weight)[0]
        direction = torch.randn_like(weight)
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * 1e-5)
                losses.append(model.loss(IDS, TARGET, LENGTHS))
                weight.sub_(direction, alpha=sign * 1e-5)
        torch.testing.assert_close((gradient * direction).sum(), (losses[0] - losses[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def reversals(count, generator):
    """Inputs of 2 to 5 tokens from 3 on, padded with 0, and their lengths; labels: reversed, then the end token 1, then -100."""
    lengths = torch.randint(2, 6, (count,), generator=generator)
    ids = torch.randint(3, 11, (count, 5), generator=generator)
    places = torch.arange(6)
    backwards = (lengths[:, None] - 1 - places).clamp(min=0)
    labels = ids.gather(1, backwards)
    labels = torch.where(places == lengths[:, None], 1, torch.where(places < lengths[:, None], labels, -100))
    return torch.where(places[:5] < lengths[:, None], ids, 0), lengths, labels


@pytest.mark.slow
@pytest.mark.parametrize("case", ["published", "norms first"])
def test_it_learns_to_reverse(case):
    torch.manual_seed(0)
    fields = MODELS[case] | ({"embedding_scale": 8.0} if "embedding_scale" in MODELS[case] else {})
    model = EncoderDecoder(configured(vocabulary=11, context=16, width=64, layers=1, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)  # GPT-2's initial weights are those of a wider model
    optimizer, generator = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98)), torch.Generator().manual_seed(0)
    for i in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min((i + 1) / 30, (STEPS - i) / STEPS)
        ids, lengths, labels = reversals(64, generator)
        optimizer.zero_grad()
        model.loss(ids, labels, lengths).backward()
        optimizer.step()
    ids, lengths, labels = reversals(200, generator)
    rows = fastgpt.generate(model, [row[:n].tolist() for row, n in zip(ids, lengths)], 6, eos=1)
    expected = [row[: n + 1].tolist() for row, n in zip(labels, lengths)]
    assert sum(row[1:].tolist() == wanted for row, wanted in zip(rows, expected)) >= 190


STEPS = 400


# What is refused

GOOD = configured()
BAD = [
    (lambda model: model(IDS, TARGET, [9, 1]), ValueError, r"lengths: expected 3 lengths from 1 to 9"),
    (lambda model: model(IDS, TARGET + 90), ValueError, "^target_ids: expected token ids from 0 to 39"),
    (lambda model: model.loss(IDS, TARGET[:2]), ValueError, "labels: expected 3 rows, as ids has, got 2"),
    (lambda model: model.loss(IDS, TARGET.int()), TypeError, "labels: expected dtype torch.int64"),
    (
        lambda model: model.loss(IDS, torch.full_like(TARGET, -100)),
        ValueError,
        "labels: expected at least one that is not -100",
    ),
    (lambda model: model.loss(IDS, TARGET + 40), ValueError, "labels: expected tokens from 0 to 39, or -100, got"),
    (lambda model: fastgpt.generate(model, [[1, 40]], 3), ValueError, "ids: expected token ids from 0 to 39, got 40"),
    (lambda model: fastgpt.generate(model, [[1] * 65], 3), ValueError, "ids: expected a prompt of at most 64 tokens"),
    (lambda model: fastgpt.generate(model, [[1]], 64), ValueError, "max_new_tokens: expected at most 63"),
    (
        lambda model: fastgpt.generate(model, [[1]], 3, encoder_lengths=[1]),
        ValueError,
        "encoder_lengths: expected None for a list",
    ),
    (lambda model: fastgpt.generate(model, IDS, 3, encoder_lengths=[1, 2]), ValueError, "encoder_lengths: expected 3 lengths"),
    (lambda model: fastgpt.generate(model, IDS, 3, encoder_lengths=5), TypeError, "encoder_lengths: expected a list"),
    (
        lambda model: fastgpt.generate(model, IDS, 3, encoder_states=torch.zeros(3, 9, 32)),
        ValueError,
        "encoder_states: expected None for an encoder-decoder",
    ),
    (lambda model: fastgpt.generate(model, IDS, 3, max_batch=2), ValueError, "model: expected one without cross-attention"),
    (lambda model: list(fastgpt.generate_each(model, IDS, 3)), ValueError, "model: expected one without cross-attention"),
    (lambda model: fastgpt.run_with_cache(model, IDS), TypeError, "model: expected a fastgpt.GPT, got EncoderDecoder"),
    (lambda model: fastgpt.decoding(model, None), TypeError, "model: expected a fastgpt.GPT, got EncoderDecoder"),
    (lambda _: EncoderDecoderConfig(GOOD.encoder, GOOD.encoder), TypeError, "decoder: expected GPTConfig, got EncoderConfig"),
    (
        lambda _: configured(decoder={"vocab_size": 41}),
        ValueError,
        "decoder.vocab_size: expected 40 beside this encoder, got 41",
    ),
    (
        lambda _: configured(decoder={"cross_attention": False}),
        ValueError,
        "decoder.cross_attention: expected True .*, got False",
    ),
    (
        lambda _: configured(decoder={"hidden_size": 64}),
        ValueError,
        "decoder.hidden_size: expected 32 beside this encoder, got 64",
    ),
    (
        lambda _: EncoderDecoderConfig(GOOD.encoder, GOOD.decoder, 40),
        ValueError,
        "start_token: expected a token from 0 to 39, got 40",
    ),
    (
        lambda _: EncoderDecoderConfig(EncoderConfig(40, 64, 2, 4, 32, token_types=2), GOOD.decoder),
        ValueError,
        "encoder.token_types: expected none beside a decoder, got 2",
    ),
    (lambda model: model(IDS, TARGET[:1]), ValueError, "target_ids: expected 3 rows, as ids has, got 1"),
    (lambda model: model(IDS, TARGET[:0]), ValueError, "target_ids: expected 3 rows, as ids has, got 0"),
    (
        lambda model: model(IDS, TARGET[:, :0]),
        ValueError,
        r"target_ids: expected shape \(B, T\) with at least one token, got \(3, 0\)",
    ),
    (lambda model: model(IDS, TARGET.float()), TypeError, "target_ids: expected dtype"),
    (
        lambda model: fastgpt.generate(model, IDS, speculate=model),
        TypeError,
        "speculate: expected .* or None, got EncoderDecoder$",
    ),
    (
        lambda _: GPTConfig(40, 64, 2, 4, 32, norm_first=False, parallel=True),
        ValueError,
        "parallel: expected False with norm_first",
    ),
    (
        lambda _: GPTConfig(40, 64, 2, 4, 32, norm_first=False, post_norms=True),
        ValueError,
        "post_norms: expected False with norm",
    ),
    (
        lambda _: GPTConfig(40, 64, 2, 4, 32, position="relative", relative_max_distance=16),
        ValueError,
        "relative_max_distance: expected at least two buckets in each direction, and more than the 16",
    ),
    (
        lambda _: EncoderConfig(40, 64, 2, 4, 32, position="relative", relative_buckets=3),
        ValueError,
        "relative_max_distance: expected at least two buckets",
    ),
]


def test_an_empty_batch_has_empty_logits():
    model = EncoderDecoder(GOOD).eval()
    assert model(IDS[:0], TARGET[:0]).shape == (0, TARGET.shape[1], 40)
    assert model.encode(IDS[:0]).shape == (0, IDS.shape[1], 32)


@pytest.mark.parametrize("call, kind, message", BAD, ids=[message[:50] for *_, message in BAD])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(EncoderDecoder(GOOD).eval())
