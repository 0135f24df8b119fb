"""Tiny checkpoints of every family that transformers makes, for tests and for benchmarks.families."""

import functools
import json

import torch
import transformers

from fastgpt import GPT, QuantizedWeight, generate
from fastgpt.testing import numerics

COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[4.0, 3.0, 2.0, 6.0])
LINEAR, LOCAL = dict(rope_type="linear", factor=4.0), dict(rope_type="default", rope_theta=1e4)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=5e5)
QWEN_EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    attention_bias=True, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, n_shared_experts=2,
    first_k_dense_replace=1,
)  # fmt: skip
CONFIGS = {
    "gpt2": (
        "GPT2",
        dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None),
    ),
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
        | dict(head_dim=32, tie_word_embeddings=True, max_position_embeddings=64)  # and four times as much with yarn
        | dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e6)),
    ),
    "phi3": ("Phi3", COMMON | dict(sliding_window=20)),
    "phi3, longrope": (
        "Phi3",
        COMMON | dict(partial_rotary_factor=0.5, original_max_position_embeddings=64, rope_parameters=LONGROPE),
    ),
    "gemma": ("Gemma", COMMON | dict(head_dim=16)),
    "gemma2": ("Gemma2", COMMON | dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=32, attn_logit_softcapping=5.0)),
    "starcoder2": ("Starcoder2", COMMON | dict(sliding_window=16, initializer_range=0.2)),
    "starcoder2, no biases, untied": ("Starcoder2", COMMON | dict(use_bias=False, tie_word_embeddings=False)),
    "stablelm": ("StableLm", COMMON | dict(partial_rotary_factor=0.25, use_qkv_bias=True)),
    "stablelm, parallel": ("StableLm", COMMON | dict(partial_rotary_factor=0.5, use_parallel_residual=True)),
    "granite": (
        "Granite",
        COMMON
        | dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0625, logits_scaling=7.0)
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "olmo2": ("Olmo2", COMMON | dict(initializer_range=0.2)),
    "olmo3": (
        "Olmo3",
        COMMON
        | dict(sliding_window=16, num_hidden_layers=4, rope_parameters=dict(full_attention=YARN, sliding_attention=LOCAL)),
    ),
    "smollm3": ("SmolLM3", COMMON | dict(num_hidden_layers=4)),
    "smollm3, windows": ("SmolLM3", COMMON | dict(no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=16)),
    "gemma3": (
        "Gemma3Text",
        COMMON
        | dict(
            head_dim=16, sliding_window=16, query_pre_attn_scalar=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        )
        | dict(rope_parameters=dict(full_attention=LINEAR | dict(rope_theta=1e6), sliding_attention=LOCAL)),
    ),
    "gpt_neox": ("GPTNeoX", {name: size for name, size in COMMON.items() if name != "num_key_value_heads"}),
    "gpt_neox, one after the other": (
        "GPTNeoX",
        {name: size for name, size in COMMON.items() if name != "num_key_value_heads"}
        | dict(use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
    ),
    "phi": ("Phi", COMMON),
    "phi, norms of queries": ("Phi", COMMON | dict(qk_layernorm=True, num_key_value_heads=4, initializer_range=0.2)),
    "glm4": ("Glm4", COMMON | dict(head_dim=24, partial_rotary_factor=0.5)),
    "cohere2": ("Cohere2", COMMON | dict(sliding_window=16, num_hidden_layers=4, logit_scale=0.5)),
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral, windows": ("Mixtral", COMMON | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16, head_dim=24)),
    "qwen2_moe": (
        "Qwen2Moe",
        COMMON | QWEN_EXPERTS | dict(shared_expert_intermediate_size=40, decoder_sparse_step=2, num_hidden_layers=4),
    ),
    "qwen2_moe, windows": (
        "Qwen2Moe",
        COMMON | QWEN_EXPERTS | dict(shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=16),
    ),
    "qwen3_moe": ("Qwen3Moe", COMMON | QWEN_EXPERTS | dict(head_dim=32, mlp_only_layers=[1], norm_topk_prob=True)),
    "gpt_oss": (
        "GptOss",
        COMMON
        | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=16, num_hidden_layers=4)
        | dict(rope_parameters=YARN | dict(truncate=False)),
    ),
    "olmoe": ("Olmoe", COMMON | dict(num_experts=8, num_experts_per_tok=3, num_key_value_heads=4, initializer_range=0.2)),
    "granitemoe": (
        "GraniteMoe",
        COMMON
        | dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
        | dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0625, logits_scaling=7.0),
    ),
    # The share of the routed experts is small: in bf16 some tokens get another one, with transformers, too.
    "deepseek_v2": (
        "DeepseekV2",
        COMMON
        | LATENT
        | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=0.25)
        | dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2",
        COMMON
        | LATENT
        | dict(q_lora_rank=None, attention_bias=False, n_shared_experts=1, first_k_dense_replace=0, routed_scaling_factor=0.25),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        COMMON
        | LATENT
        | dict(
            n_group=4, topk_group=2, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0), routed_scaling_factor=0.25
        ),
    ),
    "deepseek_v3, one group": (
        "DeepseekV3",
        COMMON | LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=0.125),
    ),
}
# What a GGUF file does not say: the scale of Gemma's queries, windows of Qwen 2, StarCoder 2 and SmolLM3, which layers of Gemma 3
# have one, norms of Phi's queries, layers without experts, biases of latent attention, another base for layers with windows.
NOT_IN_GGUF = {
    "gemma2", "qwen2, windows", "starcoder2", "olmo3", "smollm3, windows", "gemma3", "phi, norms of queries", "qwen2_moe",
    "qwen2_moe, windows", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v3, one group",
}  # fmt: skip
GGUF_CONFIGS = {case: config for case, config in CONFIGS.items() if case not in NOT_IN_GGUF} | {
    "gemma3, six layers": (
        "Gemma3Text",
        COMMON
        | dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16, num_hidden_layers=6)
        | dict(rope_parameters=dict(full_attention=LINEAR | dict(rope_theta=1e6), sliding_attention=LOCAL)),
    ),
    "qwen2_moe, all layers": ("Qwen2Moe", COMMON | QWEN_EXPERTS | dict(shared_expert_intermediate_size=96)),
    "qwen3_moe, all layers": ("Qwen3Moe", COMMON | QWEN_EXPERTS | dict(head_dim=32, norm_topk_prob=True)),
    "gemma2, scale of its heads": (
        "Gemma2",
        COMMON | dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    ),
    "olmo3, one base": (
        "Olmo3",
        COMMON
        | dict(sliding_window=16, num_hidden_layers=4)
        | dict(rope_parameters=dict(full_attention=YARN, sliding_attention=LOCAL | dict(rope_theta=5e5))),
    ),
    **{
        f"{case}, no biases": (CONFIGS[case][0], CONFIGS[case][1] | dict(attention_bias=False))
        for case in ("deepseek_v2", "deepseek_v3", "deepseek_v3, one group")
    },
}


def transformers_reads_gguf(case):
    """Whether transformers knows the architecture, and reads all of it. It does not read q and k of Mistral in their order."""
    return case.partition(",")[0] in ("gpt2", "llama", "qwen2", "qwen3", "phi3", "gemma2")


@functools.cache
@torch.inference_mode(False)  # whichever test asks first
def theirs(case):
    """A tiny model with random weights that are not what weights start from: biases and norms count."""
    name, settings = (CONFIGS | GGUF_CONFIGS)[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**json.loads(json.dumps(settings)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            in_a_block = parameter.dim() >= 2 and (".layers." in name or ".h." in name)
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if in_a_block else 0.1)  # so that tokens vary
            if ".post_" in name:
                parameter.add_(4)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_(0, 0.1)
                module.weight.mul_(0.1)  # the sigmoid of larger logits is 1 for several experts
    return model


def ids_of(batch, tokens, seed=0):
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(case, folder, dtype, rounded, path=None):
    """Yields (actual, yardstick) for logits, uncached and cached, of the checkpoint in `folder`: ours, and of those of
    transformers in float64, both with weights rounded to the dtype. `rounded`: an empty folder for those; `path`: of another
    checkpoint of the same weights, which is ours then."""
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(rounded)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float64)
    oracle.config._experts_implementation = "eager"  # of which there is float64
    model = GPT.from_pretrained(path or rounded)
    assert model.token_embedding.weight.dtype == dtype
    for tokens in (60, 150) if "longrope" in case else (150,):  # over windows, and on both sides of longrope's border
        ids = ids_of(2, tokens)
        with numerics.only_double_precision():
            yardstick = numerics.simulate(lambda: oracle(ids).logits, arithmetic=dtype)
        yield model(ids), yardstick
        yield model(ids, cache=model.new_cache(2)), yardstick


def gradient_of(case, folder):
    """(actual, yardstick): the gradient in fp32 of a text's cross-entropy with respect to the token embedding, through all layers:
    ours, and that of transformers in float64."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    oracle.config._experts_implementation = "eager"
    model, ids = GPT.from_pretrained(folder), ids_of(2, 40)

    def gradient(logits, embedding):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return torch.autograd.grad(loss, embedding)[0]

    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: gradient(oracle(ids).logits, oracle.get_input_embeddings().weight))
    return gradient(model(ids), model.token_embedding.weight), yardstick


def with_whole_groups(case):
    """Likewise to `theirs`, with matrices whose rows are of whole groups of 32."""
    config = theirs(case).config
    widths = dict(intermediate_size=128, shared_expert_intermediate_size=64, kv_lora_rank=32, q_lora_rank=32, v_head_dim=16)
    given = config.to_dict()
    torch.manual_seed(0)
    changed = {name: width for name, width in widths.items() if given.get(name) is not None}
    return transformers.AutoModelForCausalLM.from_config(type(config)(**given | changed)).eval()


@torch.no_grad()
def quantized_logits_of(case, folder):
    """(actual, yardstick): the logits in fp32 with weights of 8 bits, and those of the dequantized weights in float64. `folder`: an
    empty one."""
    with_whole_groups(case).save_pretrained(folder / "plain")
    model, ids = GPT.from_pretrained(folder / "plain", weights="int8"), ids_of(2, 60)
    assert isinstance(model.blocks[-1].attention.out.weight, QuantizedWeight)
    model.save_pretrained(folder / "quantized")
    oracle = GPT.from_pretrained(folder / "quantized", weights="dequantized").double()
    return model(ids), numerics.simulate(lambda: oracle(ids))


PROMPTS = [
    ids_of(1, length, seed=length)[0].tolist() for length in (40, 3, 21, 57)
]  # with 64 more, over windows and longrope's border


@torch.no_grad()
def their_tokens(case, prompts):
    """Padded on the left, as transformers wants it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs(case).generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


def kinds_of_cache(model) -> list[dict]:
    """Options of generate: every kind that gives the tokens of the model, and none."""
    sliding = [{"cache": "sliding"}] if model.config.windows is not None else []
    return [{}, {"cache": "paged", "page_size": 4}, *sliding, {"use_cache": False}]


def our_tokens(model, prompts, **options):
    return [row[len(prompt) :].tolist() for row, prompt in zip(generate(model, prompts, 64, **options), prompts)]
