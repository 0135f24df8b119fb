"""Checkpoints that transformers writes: the same logits and greedy tokens, and what we write, transformers reads."""

import functools
import json
import subprocess
import sys

import numerics
import pytest
import torch
from safetensors import safe_open

from fastgpt import GPT, GPTConfig, families

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[4.0, 3.0, 2.0, 6.0])
CONFIGS = {
    "gpt2": ("GPT2", dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)),
    "llama": ("Llama", COMMON),
    "llama, rope of llama 3": ("Llama", COMMON | dict(rope_parameters=LLAMA3 | dict(rope_theta=500000.0))),
    "llama, linear rope": ("Llama", COMMON | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama, biases, tied": ("Llama", COMMON | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "mistral": ("Mistral", COMMON | dict(sliding_window=16, head_dim=24)),
    "mistral, no window": ("Mistral", COMMON | dict(sliding_window=None)),
    "qwen2": ("Qwen2", COMMON),
    "qwen2, windows": ("Qwen2", COMMON | dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=32)),
    "qwen3, yarn": (
        "Qwen3",
        COMMON
        | dict(head_dim=32, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e6)),
    ),
    "phi3": ("Phi3", COMMON | dict(sliding_window=20)),
    "phi3, longrope": (
        "Phi3",
        COMMON | dict(partial_rotary_factor=0.5, original_max_position_embeddings=64, rope_parameters=LONGROPE),
    ),
    "gemma": ("Gemma", COMMON | dict(head_dim=16)),
    "gemma2": ("Gemma2", COMMON | dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=32, attn_logit_softcapping=5.0)),
}


@functools.cache
def theirs(case):
    """A tiny model with random weights that are not what weights start from: biases and norms count."""
    name, settings = CONFIGS[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**json.loads(json.dumps(settings)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            in_a_block = parameter.dim() == 2 and (".layers." in name or ".h." in name)
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if in_a_block else 0.1)  # so that tokens vary
            if ".post_" in name:
                parameter.add_(4)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case -> the folder that transformers wrote."""

    @functools.cache
    def write(case):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs(case).save_pretrained(folder)
        return folder

    return write


def ids_of(batch, tokens, seed=0):
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case, dtype, folders, tmp_path):
    """The oracle is transformers in float64; what transformers errs in the dtype is the measure."""
    low = transformers.AutoModelForCausalLM.from_pretrained(folders(case), dtype=dtype)
    low.save_pretrained(tmp_path)  # weights rounded to the dtype
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    model = GPT.from_pretrained(tmp_path)
    assert model.token_embedding.weight.dtype == dtype
    for tokens in (60, 150) if "longrope" in case else (150,):  # over windows, and on both sides of longrope's border
        ids = ids_of(2, tokens)
        expected, measure = oracle(ids).logits, low(ids).logits
        numerics.check(model(ids), expected, measure, dtype=dtype)
        numerics.check(model(ids, cache=model.new_cache(2)), expected, measure, dtype=dtype)


PROMPTS = [ids_of(1, length, seed=length)[0].tolist() for length in (40, 3, 21, 57)]  # with 64 more, over windows and longrope's border


@torch.no_grad()
def their_tokens(case, prompts):
    """Padded on the left, as transformers wants it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs(case).generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


@pytest.mark.parametrize("case", CONFIGS)
def test_greedy_tokens(case, folders):
    """Of single prompts and of a ragged batch, in every kind of cache and without one."""
    model = GPT.from_pretrained(folders(case))
    kinds = [{}, {"cache": "paged", "page_size": 4}, {"use_cache": False}]
    if model.config.windows is not None:
        kinds.append({"cache": "sliding"})
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = their_tokens(case, prompts)
        assert len({tuple(row) for row in expected}) == len(prompts) and len(set(expected[0])) > 5  # that depends on something
        for options in kinds:
            actual = model.generate(prompts, 64, **options)
            new = [row[len(prompt) :].tolist() for row, prompt in zip(actual, prompts)]
            assert new == expected, options


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS)
def test_what_we_write_transformers_reads(case, folders, tmp_path):
    model = GPT.from_pretrained(folders(case))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(theirs(case))
    ids = ids_of(2, 150)
    assert torch.equal(again(ids).logits, theirs(case)(ids).logits)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == model.config
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), model.parameters()))


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_shards(case, folders, tmp_path):
    theirs(case).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = GPT.from_pretrained(folders(case)), GPT.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), sharded.parameters()))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {shard.name} in .*which model.safetensors.index.json names"):
        GPT.from_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)  # over it
    assert torch.equal(GPT.from_pretrained(tmp_path).norm.weight, whole.norm.weight)


def test_a_dtype_can_be_asked_for(folders):
    model = GPT.from_pretrained(folders("llama"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Of earlier versions


def test_rope_settings_of_transformers_4(folders, tmp_path):
    """`rope_theta` and `rope_scaling` beside the other settings, the kind as `type`."""
    for case in ("llama, rope of llama 3", "phi3, longrope", "qwen3, yarn"):
        config = json.loads((folders(case) / "config.json").read_text())
        _, _, fields = read(config, tmp_path)
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        rope["type"] = rope.pop("rope_type")
        rope.pop("partial_rotary_factor", None)
        if "original_max_position_embeddings" in config:
            rope.pop("original_max_position_embeddings")
        assert read(config, tmp_path)[2] == fields


def read(config, folder):
    from fastgpt import checkpoint

    (folder / "config.json").write_text(json.dumps(config))
    return checkpoint.read_config(folder)


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama", {"hidden_act": "tanh"}, "expected hidden_act to be one of .*'silu'.* in a llama checkpoint, got 'tanh'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "expected the rope_type to be one of .* got 'dynamic'"),
        ("gemma2", {"use_bidirectional_attention": True}, "expected use_bidirectional_attention to be false in a gemma2"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "expected scale_attn_by_inverse_layer_idx to be False"),
        ("llama", {"model_type": "mamba"}, "model_type 'mamba', supported: gpt2, llama, mistral"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
    ],
)
def test_what_cannot_be_served(case, change, message, folders, tmp_path):
    config = json.loads((folders(case) / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        GPTConfig(**read(config, tmp_path)[2])


# What no family of transformers has


def test_other_mixtures_are_stored_as_our_own(tmp_path):
    config = GPTConfig(
        97, 64, num_layers=2, num_heads=4, hidden_size=32, norm="rms", position="sinusoidal", qkv_bias=False, windows=(8, None)
    )
    model = GPT(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastgpt"
    again = GPT.from_pretrained(tmp_path)
    assert again.config == config
    ids = ids_of(2, 30)
    assert torch.equal(again(ids), model(ids))


def test_a_family_is_kept(folders, tmp_path):
    """A mistral without a window could be a llama."""
    GPT.from_pretrained(folders("mistral, no window")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mistral"
    assert families.family_of(GPT.from_pretrained(tmp_path).config) == "llama"


# The hub


def test_hub(folders, tmp_path, monkeypatch):
    """An id that is no folder is downloaded."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return str(folders("llama"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = GPT.from_pretrained("someone/a-model.1")
    assert asked == ["someone/a-model.1"] and model.config.num_kv_heads == 2

    def unreachable(name, allow_patterns):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="someone/a-model.1 is no folder, and the Hub did not give it: OSError: no route to host$"):
        GPT.from_pretrained("someone/a-model.1")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder, ./nowhere/else/at-all does not exist"):
        GPT.from_pretrained("./nowhere/else/at-all")


# Memory


MEASURE = """
import re, sys, torch
from pathlib import Path
from fastgpt import GPT

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

GPT.from_pretrained(sys.argv[2])  # what is loaded and started once is not counted
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
model = GPT.from_pretrained(sys.argv[1])
weights = sum(parameter.nbytes for parameter in model.parameters())
print((resident("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measuring peak memory needs Linux's /proc")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peak_memory_of_loading(family, folders, tmp_path):
    """At most 1.15 times the weights; here of 300 to 400 MB, most of it in one matrix or in many."""
    if family == "gpt2":
        config = GPTConfig(60000, 64, num_layers=4, num_heads=16, hidden_size=1024)
    else:
        name, settings = CONFIGS["llama"]
        config = GPTConfig(**families.LLAMA.config_from(theirs("llama").config.to_dict()))
        import dataclasses

        config = dataclasses.replace(config, hidden_size=1024, intermediate_size=4096, num_layers=6, vocab_size=2000)
    GPT(config).save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, folders("llama")], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) <= 1.15
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) > 10
