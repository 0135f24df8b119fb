"""The decoder: its output, its cache, its checkpoints, and what it says to bad input."""

import dataclasses
import json

import pytest
import torch
from models import random_ids, random_model
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics


def test_logits_have_the_shape_and_dtype_of_the_model():
    model = random_model()
    assert model(random_ids(model, 3, 7)).shape == (3, 7, 65)
    assert model.bfloat16()(random_ids(model, 3, 7)).dtype == torch.bfloat16


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, context_length=64, num_layers=4, num_heads=4, hidden_size=64))
    ids = random_ids(model, 8, 64)
    targets = random_ids(model, 8, 64, seed=2)
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - torch.log(torch.tensor(65.0)).item()) < 0.1


def test_dropout_only_in_training():
    model = random_model(dropout=0.5)
    ids = random_ids(model, 1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 11], [19, 1]], ids=str)
def test_cached_logits_are_the_uncached_ones(chunks):
    """Whatever the pieces in which the tokens come."""
    model = random_model()
    ids = random_ids(model, 3, 20)
    cache = model.new_cache(3, 24)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(chunks, dim=1)], dim=1)
    numerics.check(logits, lambda: model.double()(ids))
    assert cache.length == 20 and cache.lengths.tolist() == [20, 20, 20]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"kind": "sliding", "window": 9}, {"kind": "paged", "page_size": 4}], ids=str)
def test_the_last_token_alone(options):
    """The same logits and the same cache, whether the last block computes all tokens or one, of prompts of any length."""
    model = random_model()
    ids = random_ids(model, 3, 20)
    for new in (None, [20, 1, 13]):
        whole, alone = model.new_cache(3, **options), model.new_cache(3, **options)
        model.hidden(ids, whole, new)
        actual = model.hidden(ids, alone, new, last_only=True)
        numerics.check(actual, lambda: model.double().hidden(ids, model.new_cache(3, **options), new)[:, -1:])
        model.float()
        token = random_ids(model, 3, 1, seed=2)
        assert torch.equal(model(token, cache=alone), model(token, cache=whole))


@torch.no_grad()
def test_the_cache_is_allocated_once():
    model = random_model()
    cache = model.new_cache(1)
    assert cache.storage.k.shape == (2, 1, 4, 96, 16)
    before = cache.storage.k.data_ptr(), cache.storage.v.data_ptr(), cache.lengths.data_ptr()
    for token in random_ids(model, 1, 96).split(1, dim=1):
        model(token, cache=cache)
    assert before == (cache.storage.k.data_ptr(), cache.storage.v.data_ptr(), cache.lengths.data_ptr())


@torch.no_grad()
def test_a_decode_step_allocates_the_same_at_any_context_length():
    """Bytes that PyTorch's allocator hands out in one step with 10 and with 2,000 tokens in the cache."""
    model = random_model(context=2048)
    cache = model.new_cache(1)

    def allocated(tokens):
        with torch.profiler.profile(profile_memory=True) as profile:
            model(tokens, cache=cache)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    model(random_ids(model, 1, 10), cache=cache)
    few = allocated(random_ids(model, 1, 1))
    model(random_ids(model, 1, 1989), cache=cache)
    many = allocated(random_ids(model, 1, 1))
    assert cache.length == 2001
    assert 0 < many <= few


@pytest.mark.slow
def test_compiles_as_one_graph():
    model = random_model(layers=1)
    ids = random_ids(model, 2, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), model(ids))


@pytest.mark.slow
def test_compiles_as_one_graph_with_a_cache():
    model = random_model(layers=1)
    ids = random_ids(model, 2, 8)
    with torch.no_grad():
        cache = model.new_cache(2)
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, cache=cache)
        assert torch.equal(logits, model(ids, cache=model.new_cache(2)))
        assert cache.length == 8 and cache.storage.k.abs().sum() > 0


# Checkpoints


def test_saving_and_loading_gives_the_same_model(tmp_path):
    model = random_model(dropout=0.25, norm_eps=1e-6)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and not loaded.training
    ids = random_ids(model, 2, 9)
    assert torch.equal(loaded(ids), model(ids))
    assert GPT.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_transformers_reads_and_writes_the_same_checkpoints(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = random_model()
    ids = random_ids(model, 2, 30)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        theirs.double()
        numerics.check(model(ids), lambda: theirs(ids).logits)
        assert torch.equal(GPT.from_pretrained(tmp_path / "theirs")(ids), model(ids))


def test_names_without_prefix_and_mask_buffers_are_accepted(tmp_path):
    """As in OpenAI's own GPT-2 files."""
    model = random_model()
    model.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(weights, tmp_path / "model.safetensors")
    ids = random_ids(model, 1, 5)
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids), model(ids))


@pytest.fixture
def folder(tmp_path):
    random_model().save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


DAMAGE = {
    "weights missing": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "expected model.safetensors or .*index.json in",
    ),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        ValueError,
        "model.safetensors is damaged",
    ),
    "a weight missing": (
        lambda f: edit_weights(f, lambda w: w.pop("transformer.h.1.ln_2.bias")),
        ValueError,
        r"lacks weights: transformer.h.1.ln_2.bias$",
    ),
    "a weight unexpected": (
        lambda f: edit_weights(f, lambda w: w.update({"transformer.h.9.x": torch.zeros(1)})),
        ValueError,
        r"has unexpected weights: transformer.h.9.x$",
    ),
    "a weight misshapen": (
        lambda f: edit_weights(f, lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(3, 4)})),
        ValueError,
        r"transformer.h.0.mlp.c_fc.weight: expected shape \(64, 256\), got \(3, 4\)",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "expected config.json in"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is damaged"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json is damaged"),
    "an entry missing": (
        lambda f: edit_config(f, n_layer="gone"),
        ValueError,
        "config.json: n_layer: expected an integer .*, got nothing",
    ),
    "another architecture": (
        lambda f: edit_config(f, model_type="mamba"),
        ValueError,
        "config.json: model_type: expected one of 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'gemma', 'gemma2', .* got 'mamba'",
    ),
    "an encoder": (
        lambda f: edit_config(f, model_type="bert"),
        ValueError,
        "config.json: model_type: expected a decoder, got 'bert', which fastgpt.Encoder loads",
    ),
    "another activation": (
        lambda f: edit_config(f, activation_function="tanh"),
        ValueError,
        "config.json: activation_function: expected one of .*'gelu_new'.*, got 'tanh'",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(case, folder):
    damage, error, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(error, match=message):
        GPT.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder, .*nowhere does not exist"):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastgpt.checkpoints.transformers_format.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        random_model(seed=1).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": -1}, "num_layers: expected an integer >= 0 and <= 65536, got -1"),
        ({"num_heads": 0}, "num_heads: expected an integer >= 1 and <= 65536, got 0"),
        ({"hidden_size": 63, "head_dim": None}, "hidden_size: expected a multiple of num_heads=4, got 63"),
        ({"dropout": 1.0}, "dropout: expected a finite number >= 0 and < 1, got 1.0"),
    ],
)
def test_bad_config(change, message):
    config = random_model().config
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_bad_ids():
    model = random_model()
    with pytest.raises(ValueError, match=r"ids: expected shape \(B, T\) with at least one token, got \(5,\)"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: expected shape \(B, T\) with at least one token, got \(2, 0\)"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids: expected token ids from 0 to 64, got 3 to 65"):
        model(torch.tensor([[3, 65]]))
    with pytest.raises(TypeError, match="ids: expected dtype torch.int64 or torch.int32, got torch.float32"):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at most 96 tokens .the context., got 0 cached . 97 new"):
        model(random_ids(model, 1, 97))


def test_a_full_cache_raises_and_stays_as_it_is():
    model = random_model()
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        model(random_ids(model, 1, 3), cache=cache)
        k = cache.storage.k.clone()
        with pytest.raises(ValueError, match="cache: expected at most 4 tokens .its capacity., got 3 stored . 2 new"):
            model(random_ids(model, 1, 2), cache=cache)
        assert torch.equal(cache.storage.k, k) and cache.length == 3
        assert model(random_ids(model, 1, 1), cache=cache).isfinite().all()


def test_a_cache_of_another_batch_size():
    model = random_model()
    with pytest.raises(ValueError, match="cache: expected batch size 2, as ids has, got 1"):
        model(random_ids(model, 2, 3), cache=model.new_cache(1))


@pytest.mark.parametrize("fields", [{}, {"norm": "rms", "gated": True, "activation": "silu", "num_kv_heads": 2}], ids=str)
@torch.no_grad()
def test_on_the_meta_device_logits_have_their_shape(fields):
    """As tools ask that lay out a model without memory for it."""
    model, ids = random_model(layers=1, **fields), random_ids(random_model(), 2, 5)
    expected, actual = model(ids), model.to("meta")(ids.to("meta"))
    assert actual.is_meta and (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


ROTARY = {"position": "rotary", "rope": Rope(8)}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pre_norms": 1}, "pre_norms: expected 2 or 0 for blocks that are not parallel, got 1"),
        ({"pre_norms": 3}, "pre_norms: expected an integer .* got 3"),
        ({"parallel": True, "cross_attention": True}, "parallel: expected False with cross_attention, got True"),
        ({"output_bias": True}, "output_bias: expected False with tie_embeddings, got True"),
        ({"rope_layers": (True, False)}, r"rope_layers: expected None without rope, got \(True, False\)"),
        (ROTARY | {"rope_layers": (True,)}, r"rope_layers: expected 2 entries, one for each layer, got \(True,\)"),
        ({"local_rope": Rope(8)}, "local_rope: expected None without rope"),
        (ROTARY | {"local_rope": Rope(18)}, "local_rope.dim: expected at most head_dim=16, got 18"),
        ({"residual_scale": 0.0}, "residual_scale: expected a finite number >= 1e-06 .* got 0.0"),
    ],
)
def test_fields_that_do_not_fit_together_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        random_model(**fields)


@pytest.mark.parametrize("model", [fastgpt.GPT, fastgpt.Encoder, fastgpt.EncoderDecoder])
def test_a_config_of_another_class_is_named(model):
    with pytest.raises(TypeError, match=f"^config: expected a fastgpt.{model.__name__}Config, got {{'vocab_size': 65}}$"):
        model({"vocab_size": 65})


@torch.no_grad()
def test_a_residual_scale_leaves_what_it_multiplies(tmp_path):
    """The stream that is kept divided by it gives what one does that is not, for every position embedding."""
    for position in ({"position": "learned"}, {"position": "sinusoidal", "norm": "rms", "embedding_scale": 3.0}):
        model = random_model(**position, residual_scale=0.5, norm_eps=1e-3)
        plain = random_model(**position, norm_eps=1e-3)
        for block, scaled in zip(plain.blocks, model.blocks):
            for layer, other in ((block.attention.out, scaled.attention.out), (block.mlp.down, scaled.mlp.down)):
                layer.weight.copy_(other.weight * 0.5)
                layer.bias.copy_(other.bias * 0.5)
        ids = random_ids(model, 2, 30)
        torch.testing.assert_close(model(ids), plain(ids))
        torch.testing.assert_close(model(ids, cache=model.new_cache(2)), plain(ids))
