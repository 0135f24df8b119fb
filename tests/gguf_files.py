"""GGUF files as llama.cpp's converter writes them from models of transformers."""

import math

import gguf
import numpy as np
import torch

RopeType = gguf.RopeScalingType


ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "gpt_neox": "gptneox", "phi": "phi2", "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "olmo3": "olmo2", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}  # fmt: skip


def interleaved(weight, heads):
    """Rows of rotary pairs (n, n + dim/2) as (2n, 2n + 1), which llama.cpp rotates in Llama."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, blocks=None, metadata=None, **options):
    """Writes a model of transformers to a GGUF file.

    Args:
        blocks: (name, float32 array) -> what is stored of a matrix, and its type; default: as it is, in F32.
        metadata: writer -> None: adds more, as a tokenizer.
        options: of gguf.GGUFWriter.
    """
    config = model.config
    family = config.model_type
    architecture = ARCHITECTURES.get(family, family)
    like_llama = architecture in ("llama", "granite", "granitemoe", "smollm3")
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_name(f"a tiny {family}")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    if family == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        if family != "gpt_neox":
            writer.add_head_count_kv(1 if architecture == "deepseek2" else config.num_key_value_heads)
        if hasattr(config, "rms_norm_eps"):
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        else:
            writer.add_layer_norm_eps(config.norm_epsilon if family == "starcoder2" else config.layer_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        add_rotation(writer, config, config.qk_rope_head_dim if architecture == "deepseek2" else head_dim)
    if family in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config.use_parallel_residual)
    if hasattr(config, "num_experts_per_tok"):
        counts = (getattr(config, name, None) for name in ("num_experts", "n_routed_experts", "num_local_experts"))
        writer.add_expert_count(next(count for count in counts if count))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if family in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture == "deepseek2":
        add_latent_attention(writer, config)
    if family in ("granite", "granitemoe"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family == "cohere2":
        writer.add_logit_scale(config.logit_scale)
    if (
        family != "gpt2"
        and architecture != "deepseek2"
        and head_dim * heads != config.hidden_size
        or family.startswith("gemma")
    ):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "olmo3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if family == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if metadata is not None:
        metadata(writer)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    stored = dict(each_matrix(model))
    tied = config.tie_word_embeddings
    for name, weight in stored.items():
        if tied and name == "lm_head.weight":
            continue
        weight = weight.detach().float().numpy()
        if name.endswith("shared_expert_gate.weight"):
            weight = weight[0]
        if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T
        if family == "gpt_neox" and ".query_key_value." in name:  # of each head -> of all heads
            weight = weight.reshape(heads, 3, head_dim, -1).swapaxes(0, 1).reshape(weight.shape)
        if like_llama and ".q_proj." in name:
            weight = interleaved(weight, heads)
        if like_llama and ".k_proj." in name:
            weight = interleaved(weight, config.num_key_value_heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        weight, kind = np.ascontiguousarray(weight), gguf.GGMLQuantizationType.F32
        if blocks is not None and weight.ndim >= 2 and not name.endswith((".bias", "ffn_gate_inp.weight")):
            weight, kind = blocks(name, weight)
        writer.add_tensor(name, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def each_matrix(model):
    """Names and tensors of a model's state, of which the experts' are those that files have."""
    for name, weight in model.state_dict().items():
        for theirs, converted in (
            (".block_sparse_moe.experts.", ".mlp.experts."),
            ("_moe.router.weight", "_moe.router.layer.weight"),
            (".gate.e_score_correction_bias", ".e_score_correction.bias"),
        ):
            name = name.replace(theirs, converted)
        module, _, kind = name.rpartition(".")
        if kind == "sinks":
            name += ".weight"
        if module.endswith(".kv_b_proj"):  # for the absorbed form, in which keys are not computed
            config = model.config
            by_head = weight.unflatten(0, (config.num_attention_heads, -1))
            keys, values = by_head.split((config.qk_nope_head_dim, config.v_head_dim), 1)
            yield name.replace("kv_b_proj", "k_b_proj"), keys.mT
            yield name.replace("kv_b_proj", "v_b_proj"), values
            continue
        if not module.endswith(".experts"):
            yield name, weight
            continue
        matrix, ending = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
        if model.config.model_type == "gpt_oss" and ending == "weight":
            weight = weight.mT
        if matrix == "down_proj":
            yield f"{module}.down_proj.{ending}", weight
        else:
            interleaved = model.config.model_type == "gpt_oss"
            gate, up = (weight[:, 0::2], weight[:, 1::2]) if interleaved else weight.chunk(2, 1)
            yield f"{module}.gate_proj.{ending}", gate
            yield f"{module}.up_proj.{ending}", up


def add_latent_attention(writer, config):
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotated)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_nope_head_dim + rotated)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    sigmoid = config.model_type == "deepseek_v3"
    if sigmoid and config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if sigmoid:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])


def add_rotation(writer, config, head_dim):
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    rotated, theta = int(head_dim * share), rope["rope_theta"]
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(theta)
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(RopeType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    elif kind == "llama3":
        original, low, high = (rope[x] for x in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
        factors = []
        for frequency in 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated):
            wavelength = 2 * math.pi / frequency
            if wavelength < original / high:
                factors.append(1)
            elif wavelength > original / low:
                factors.append(rope["factor"])
            else:
                smooth = (original / wavelength - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
