"""Checkpoints that transformers writes: the same logits and greedy tokens, and what we write, transformers reads."""

import functools
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, decoding
from fastgpt.checkpoints import families
from fastgpt.generation.replay import Recording
from fastgpt.ops.moe import MOE_IMPLEMENTATIONS
from fastgpt.testing import numerics

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from checkpoint_files import peak_of_loading  # noqa: E402
from family_checkpoints import (  # noqa: E402
    CONFIGS,
    PROMPTS,
    gradient_of,
    ids_of,
    kinds_of_cache,
    logits_of,
    our_tokens,
    quantized_logits_of,
    their_tokens,
    theirs,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case -> the folder that transformers wrote."""

    @functools.cache
    def write(case):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs(case).save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case, dtype, folders, tmp_path):
    for actual, yardstick in logits_of(case, folders(case), dtype, tmp_path):
        numerics.check(actual, yardstick)


@pytest.mark.parametrize("case", CONFIGS)
def test_gradients(case, folders):
    numerics.check(*gradient_of(case, folders(case)))


@pytest.mark.parametrize("case", CONFIGS)
def test_quantized_weights(case, tmp_path):
    numerics.check(*quantized_logits_of(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_greedy_tokens(case, folders):
    """Of single prompts and of a ragged batch, in every kind of cache and without one."""
    model = GPT.from_pretrained(folders(case))
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = their_tokens(case, prompts)
        assert len({tuple(row) for row in expected}) == len(prompts) and len(set(expected[0])) > 5  # that depends on something
        for options in kinds_of_cache(model):
            assert our_tokens(model, prompts, **options) == expected, options


@pytest.mark.slow
@pytest.mark.parametrize("case", ["phi3, longrope", "gemma2", "llama"])
def test_prompts_in_pieces(case, folders):
    """Of 30 tokens: the first ones are within longrope's border, which the prompt is not, windows end within others."""
    model = GPT.from_pretrained(folders(case))
    prompts = [ids_of(1, length, seed=length)[0].tolist() for length in (100, 70, 7)]
    for options in kinds_of_cache(model)[:-1]:
        assert our_tokens(model, prompts, prefill_chunk=30, **options) == our_tokens(model, prompts, use_cache=False)


@torch.inference_mode()
@pytest.mark.parametrize("case", CONFIGS)
def test_decode_steps_are_captured(case, folders):
    """All of a layer runs in fastgpt's operations, and a captured step gives the bits of one that is not. Without a kernel for
    mixtures of experts, steps are not captured."""
    model = GPT.from_pretrained(folders(case))
    for batch in (1, 3):
        ids, eager, captured = ids_of(batch, 40), model.new_cache(batch), model.new_cache(batch)
        for cache in (eager, captured):
            model(ids[:, :20], cache=cache)
        step = decoding(model, captured)
        (recorded,) = [cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, Recording)]
        for token in ids[:, 20:].T:
            assert torch.equal(step(token), model(token.unsqueeze(1), cache=eager)[:, -1])
        if model.config.num_experts is not None and "cpp" not in MOE_IMPLEMENTATIONS:
            assert "is not one of fastgpt's operations" in recorded.step.refused
            continue
        assert recorded.step.refused is None and len(recorded.step.plan) >= 6 * model.config.num_layers + 1


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_our_checkpoints(case, folders, tmp_path):
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


@torch.no_grad()
@pytest.mark.parametrize("case", ["gpt_neox", "glm4", "cohere2"])
def test_rows_of_quantized_weights_are_in_the_order_of_plain_ones(case, tmp_path):
    """In the checkpoints of these families, those of queries, keys and values are in another order than in the decoder."""
    name, settings = CONFIGS[case]
    config = getattr(transformers, f"{name}Config")(**settings | dict(intermediate_size=128))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    model, plain = GPT.from_pretrained(tmp_path / "plain", weights="int8"), GPT.from_pretrained(tmp_path / "plain")
    for block, exact in zip(model.blocks, plain.blocks):
        weight = exact.attention.qkv.weight
        assert (block.attention.qkv.weight.dequantize() - weight).abs().max() < 0.01 * weight.abs().max()
    model.save_pretrained(tmp_path / "blocks")
    assert torch.equal(GPT.from_pretrained(tmp_path / "blocks")(ids_of(1, 20)), model(ids_of(1, 20)))
    model.save_pretrained(tmp_path / "numbers", weights="dequantized")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "numbers", dtype=torch.float64)
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: again(ids_of(1, 20)).logits)
    numerics.check(model(ids_of(1, 20)), yardstick)


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
    from fastgpt.checkpoints import transformers_format

    (folder / "config.json").write_text(json.dumps(config))
    return transformers_format.read_config(folder)


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama", {"hidden_act": "tanh"}, "config.json: hidden_act: expected one of 'silu', .*, got 'tanh'"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type: expected one of .* got 'axial'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected null .* got True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected null .* got True"),
        ("llama", {"model_type": "mamba"}, "model_type: expected one of 'gpt2', 'llama', 'mistral', .*, got 'mamba'"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads=4, got 3"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm: expected null .* got True"),
        ("stablelm", {"head_dim": 24}, "head_dim: expected 16, hidden_size / num_attention_heads, got 24"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: expected null .* got 30.0"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_theta: expected one of the entries full_attention",
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers: expected 4 of them, as many as num_hidden_layers, got \[1, 0\]",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: expected null .* not supported, got True"),
        ("deepseek_v2", {"n_group": 3}, "n_group: expected a divisor of n_routed_experts=8, got 3"),
        ("deepseek_v2", {"topk_group": 1}, "topk_group: expected from 2 to n_group=4, got 1"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads: expected num_attention_heads=4, got 2"),
        ("deepseek_v2", {"qk_nope_head_dim": 576}, "qk_nope_head_dim: expected at most 568 beside qk_rope_head_dim=8, got 576"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: expected True, got False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid', got 'softmax'"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 3}, "n_group: expected at most n_routed_experts / 2, 4, got 8"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
    ],
)
def test_unsupported_configurations_are_named(case, change, message, folders, tmp_path):
    config = json.loads((folders(case) / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        read(config, tmp_path)


def test_layers_that_predict_further_tokens_are_not_read(folders, tmp_path):
    config = json.loads((folders("deepseek_v3") / "config.json").read_text())
    weights = load_file(folders("deepseek_v3") / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): weight.clone() for name, weight in weights.items() if "layers.2." in name
    }
    save_file(weights | further | {"model.layers.3.eh_proj.weight": torch.ones(3, 5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    model, whole = GPT.from_pretrained(tmp_path), GPT.from_pretrained(folders("deepseek_v3"))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), whole.parameters()))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"has unexpected weights: model.layers.3.eh_proj.weight, .* and \d+ more"):
        GPT.from_pretrained(tmp_path)


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


# Memory


@pytest.mark.slow
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
    assert peak_of_loading(tmp_path, folders("llama")) <= 1.15
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) > 10
