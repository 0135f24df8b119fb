"""Continuous batching of transformers with fastgpt's attention, against generation of each prompt alone with eager attention."""

import runpy

import pytest
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import AttentionInterface

import fastgpt.integrations.transformers as ft

continuous_batching = pytest.importorskip(
    "transformers.generation.continuous_batching", reason="needs transformers' continuous batching"
)
pytest.importorskip(
    "transformers.generation.continuous_batching.cache_allocators", reason="needs transformers 5.23 or newer"
)  # fmt: skip

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),  # two pages
    "mistral, ring of 10": lambda: transformers.MistralConfig(**SIZES, sliding_window=10),  # no whole number of pages
    "mistral, ring in a page": lambda: transformers.MistralConfig(**SIZES, sliding_window=3),
    "gemma2, soft caps": lambda: transformers.Gemma2Config(
        **SIZES, **HYBRID, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gpt_oss, sinks": lambda: transformers.GptOssConfig(**SIZES, **HYBRID, sliding_window=8, num_local_experts=4),
}
NEW_TOKENS = 14
PAGE = 4


@pytest.fixture(autouse=True)
def registered():
    ft.register()
    yield
    ft.unregister()


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():  # random logits are too flat to tell errors
        weight.data = torch.randn_like(weight) if "sinks" in name else weight.data * 4 if weight.dim() > 1 else weight.data
    return model


def prompts_of(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]


def generation(**options):
    return GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0, **options
    )  # fmt: skip


def alone(model, prompts):
    """Greedy tokens of each prompt on its own."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=generation(), min_new_tokens=NEW_TOKENS
        )
        results.append(out[0, len(prompt) :].tolist())
    return results


def batched(model, prompts, **options):
    """The tokens of continuous batching, with small pages and steps of few tokens: prompts are read in chunks beside others."""
    options = {"page_size": PAGE, "num_blocks": 64, "max_batch_tokens": 16} | options
    with torch.inference_mode():
        outputs = model.generate_batch(
            prompts, generation_config=generation(), continuous_batching_config=ContinuousBatchingConfig(**options)
        )
    results = [*outputs.values()]
    assert [result.error for result in results] == [None] * len(prompts)
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize("family", CONFIGS)
def test_batches_of_ragged_prompts_give_the_tokens_of_each_prompt_alone(family):
    model = model_of(CONFIGS[family]())
    prompts = prompts_of(1, 5, 23, 11)
    expected = alone(model, prompts)
    model.set_attn_implementation("fastgpt")
    with ft.record() as calls:
        assert batched(model, prompts) == expected
    assert set(calls) == {"cpp"}


@pytest.mark.parametrize("attention", ["sdpa", "paged|eager"])
def test_tokens_are_those_of_transformers_own_continuous_batching(attention):
    model = model_of(CONFIGS["llama"]())
    prompts = prompts_of(7, 3, 30)
    model.set_attn_implementation(attention)
    expected = batched(model, prompts)
    model.set_attn_implementation("fastgpt")
    assert batched(model, prompts) == expected


def test_sdpa_is_served_without_masks_where_it_is_registered():
    model = model_of(CONFIGS["llama"]())
    model.set_attn_implementation("sdpa")
    prompts = prompts_of(7, 3, 30)
    expected = batched(model, prompts)
    ft.register("sdpa")
    with ft.record() as calls:
        assert batched(model, prompts) == expected
    assert set(calls) == {"cpp"}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_steps_read_pages_and_gather_nothing(family, monkeypatch):
    model = model_of(CONFIGS[family]())
    prompts = prompts_of(9, 5)
    expected = alone(model, prompts)
    model.set_attn_implementation("fastgpt")

    def gathers(*args, **options):
        raise AssertionError("keys and values were gathered")

    monkeypatch.setattr(torch, "index_select", gathers)
    assert batched(model, prompts) == expected
    if family == "llama":
        assert batched(model, prompts, max_blocks_per_request=0) == expected  # no block tables from transformers


def test_prompts_with_a_prefix_in_the_cache_give_the_same_tokens():
    model = model_of(CONFIGS["llama"]())
    prefix, *ends = prompts_of(12, 3, 6)
    prompts = [prefix + end for end in ends]
    expected = alone(model, prompts)
    model.set_attn_implementation("fastgpt")
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=64, max_batch_tokens=16)
    with model.continuous_batching_context_manager(
        generation_config=generation(), continuous_batching_config=config
    ) as manager:  # fmt: skip
        for prompt, tokens in zip(prompts, expected):
            request = manager.add_request(prompt)
            assert manager.get_result(request_id=request, timeout=60).generated_tokens == tokens


def test_a_cache_that_is_too_small_for_all_gives_the_same_tokens():
    model = model_of(CONFIGS["llama"]())
    prompts = prompts_of(9, 17, 12, 5)
    expected = alone(model, prompts)
    model.set_attn_implementation("fastgpt")
    assert batched(model, prompts, num_blocks=12) == expected


def test_dtypes_that_are_not_served_are_refused_by_name():
    model = model_of(CONFIGS["llama"]()).to(torch.float8_e4m3fn)
    model.set_attn_implementation("fastgpt")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: expected a dtype of .*, got torch\.float8_e4m3fn"):
        model.init_continuous_batching(generation_config=generation())


def test_compiled_steps_are_refused_by_name():
    model = model_of(CONFIGS["llama"]())
    model.set_attn_implementation("fastgpt")
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=8, max_batch_tokens=16, default_compile_level=1)
    manager = model.init_continuous_batching(generation_config=generation(), continuous_batching_config=config)
    with pytest.raises(ValueError, match="varlen_compile_config: expected None with fastgpt's attention"):
        manager._create_batch_processor()


def test_unregister_gives_transformers_its_functions_back():
    before = continuous_batching.continuous_api.PagedAttentionCache
    ft.unregister()
    assert continuous_batching.continuous_api.PagedAttentionCache is continuous_batching.PagedAttentionCache
    ft.register()
    assert continuous_batching.continuous_api.PagedAttentionCache is not before
    model = model_of(CONFIGS["llama"]())
    model.set_attn_implementation("fastgpt")
    ft.unregister()
    with pytest.raises(ValueError, match="Implementation fastgpt is not supported"):
        model.init_continuous_batching(generation_config=generation())


def test_the_command_line_serves_sdpa(monkeypatch):
    cli = pytest.importorskip("transformers.cli.transformers")
    served = []
    monkeypatch.setattr(cli, "main", lambda: served.append(AttentionInterface._global_mapping["sdpa"]))
    runpy.run_module("fastgpt.integrations.transformers", run_name="__main__")
    assert served == [ft.attention]
