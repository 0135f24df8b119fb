"""Small models of transformers with random weights, for comparing attention implementations on the same weights."""

import copy
import functools
import inspect
import math
import warnings
from collections import Counter
from typing import NamedTuple

import torch
import transformers

import fastgpt.integrations.transformers as ft
from fastgpt.testing import numerics

VOCABULARY = 90
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = LAYERS | {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
IMAGE = LAYERS | {"image_size": 16, "patch_size": 4}
SEQ2SEQ = TEXT | {
    "d_model": 32, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
}  # fmt: skip
T5 = {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "relative_attention_num_buckets": 8}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64, "begin_suppress_tokens": None}
# Values of other head dims than keys.
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 2,
}  # fmt: skip
PAIRS = {"num_key_value_heads": 2}  # of the four heads
WIDE = PAIRS | {"head_dim": 16}
SLIDING = {"sliding_window": 6}
BOTH = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Architecture(NamedTuple):
    """A model class, its configuration, and what it takes: "decoder", "encoder", "seq2seq", "speech", "image" or "both"."""

    model: str
    kind: str
    config: dict
    padding: tuple[str, ...] = ("left", "right")  # sides on which its batches can be padded

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "seq2seq", "speech")


def decoder(model: str, **config) -> Architecture:
    return Architecture(model, "decoder", TEXT | config)


ARCHITECTURES = {
    "gpt2": decoder("GPT2LMHeadModel"),
    "llama": decoder("LlamaForCausalLM", **WIDE),
    "mistral": decoder("MistralForCausalLM", **WIDE, **SLIDING),
    "mixtral": decoder("MixtralForCausalLM", **WIDE, **SLIDING, **EXPERTS),
    "qwen2": decoder("Qwen2ForCausalLM", **PAIRS),
    "qwen3": decoder("Qwen3ForCausalLM", **WIDE),
    "phi": decoder("PhiForCausalLM", **PAIRS),
    "phi3": decoder("Phi3ForCausalLM", **PAIRS, **SLIDING),
    "gemma": decoder("GemmaForCausalLM", num_key_value_heads=1, head_dim=16),
    "gemma2": decoder("Gemma2ForCausalLM", **WIDE, **BOTH, attn_logit_softcapping=2.0),
    "gemma3": decoder("Gemma3ForCausalLM", **WIDE, **BOTH),
    "gpt_oss": decoder("GptOssForCausalLM", **WIDE, **BOTH, **EXPERTS),
    "gpt_neox": decoder("GPTNeoXForCausalLM"),
    "gptj": decoder("GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "opt": decoder("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "stablelm": decoder("StableLmForCausalLM", **PAIRS),
    "olmo2": decoder("Olmo2ForCausalLM", **PAIRS),
    "cohere": decoder("CohereForCausalLM", **PAIRS),
    "cohere2": decoder("Cohere2ForCausalLM", **PAIRS, **BOTH),
    "granite": decoder("GraniteForCausalLM", **PAIRS, attention_multiplier=0.3),
    "starcoder2": decoder("Starcoder2ForCausalLM", **PAIRS, **SLIDING),
    "deepseek_v2": decoder("DeepseekV2ForCausalLM", **MLA),
    "deepseek_v3": decoder("DeepseekV3ForCausalLM", **MLA),
    "llama4": decoder("Llama4ForCausalLM", **WIDE, attention_chunk_size=5, intermediate_size_mlp=48, num_local_experts=2),
    "bert": Architecture("BertModel", "encoder", TEXT),
    "roberta": Architecture("RobertaModel", "encoder", TEXT),
    "distilbert": Architecture("DistilBertModel", "encoder", TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "albert": Architecture("AlbertModel", "encoder", TEXT | {"embedding_size": 32}),
    "modernbert": Architecture("ModernBertModel", "encoder", TEXT | {"local_attention": 6, "global_attn_every_n_layers": 2}),
    "bart": Architecture("BartForConditionalGeneration", "seq2seq", SEQ2SEQ),
    "t5": Architecture("T5ForConditionalGeneration", "seq2seq", SEQ2SEQ | T5),
    "whisper": Architecture("WhisperForConditionalGeneration", "speech", SEQ2SEQ | WHISPER),
    "vit": Architecture("ViTModel", "image", IMAGE, ()),
    "clip": Architecture(
        "CLIPModel",
        "both",
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 16},
        ("right",),
    ),
    "falcon": decoder("FalconForCausalLM"),
    "bloom": decoder("BloomForCausalLM", n_layer=2, n_head=4),
    "gpt_neo": decoder(
        "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6
    ),
}
COMPILED = ("gpt2", "gemma2", "bert")
ALONE = ("falcon", "bloom", "gpt_neo")  # whose attention does not go through transformers' AttentionInterface


def build(name: str, implementation="eager", dtype=torch.float32):
    """The model of that name in evaluation mode, with weights that make its output depend on everything that it attends to."""
    architecture = ARCHITECTURES[name]
    cls = getattr(transformers, architecture.model)
    config = cls.config_class(**architecture.config)
    config._experts_implementation = "eager"  # of which there is float64
    model = cls._from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() < 2:  # norms' weights are about 1
                parameter.normal_(1.0 if path.endswith("weight") else 0.0, 0.2, generator=generator)
            else:
                parameter.normal_(0.0, 1.0 if "emb" in path else 1.5 / math.sqrt(parameter.shape[-1]), generator=generator)
    return model.to(dtype).eval()


def inputs(name: str, padding: str | None = None, batch=3, T=13) -> dict[str, torch.Tensor]:
    """Arguments for `outputs`: sequences of different lengths, padded on one side, or all of length T."""
    kind, generator = ARCHITECTURES[name].kind, torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, T), generator=generator)
    real = torch.ones_like(ids)
    if padding is not None:
        for row, length in zip(real, (T, T - 4, 3)):
            row[: T - length] = 0
        real = real if padding == "left" else real.flip(1)
        ids = ids * real  # the id of padding is 0
    text = {"input_ids": ids, "attention_mask": real}
    if kind in ("image", "both"):
        pixels = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
        return pixels if kind == "image" else text | pixels
    if kind == "speech":
        features = torch.randn(batch, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "decoder_attention_mask": real}
    if kind == "seq2seq":
        return text | {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": real.flip(0)}
    return text


def outputs(model, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model says about its real tokens and its images."""
    dtype = next(model.parameters()).dtype
    result = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()})
    if "text_embeds" in result:
        return {name: result[name] for name in ("text_embeds", "image_embeds")}
    numbers = result.logits if "logits" in result else result.last_hidden_state
    real = arguments.get("decoder_attention_mask", arguments.get("attention_mask"))
    return {"output": numbers if real is None else numbers[real.bool()]}


def gradients(model, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a fixed linear function of the outputs, by every parameter."""
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    numbers = torch.cat([x.flatten() for x in outputs(model, arguments).values()])
    (numbers @ torch.randn(len(numbers), generator=generator).to(numbers.dtype)).backward()
    return {path: x.grad for path, x in model.named_parameters() if x.grad is not None}


def shares(
    name: str, padding: str | None, function=outputs, prepared=lambda model: model, implementation="fastgpt"
) -> tuple[Counter, dict[str, float]]:
    """fastgpt against eager attention: the calls that it served, and of each of the outputs or gradients the error as a share
    of the bound."""
    arguments = inputs(name, padding)
    with ft.record() as calls:
        actual = function(prepared(build(name, implementation)), arguments)
    with numerics.only_double_precision():
        model = build(name, dtype=torch.float64)
        yardsticks = numerics.simulate(lambda: function(model, arguments))
    assert actual.keys() == yardsticks.keys()
    return calls, {part: numerics.compare(actual[part], yardstick).share for part, yardstick in yardsticks.items()}


def check_model(found, model, arguments, function=outputs, arithmetic=torch.float32) -> None:
    """Checks what `function` gave for a model and arguments by the numerics contract, against a copy of `model`, which is not
    optimized, in float64."""
    with numerics.only_double_precision():
        double = copy.deepcopy(model).double()
        numerics.check(found, lambda: function(double, arguments), arithmetic=arithmetic)


def compiled(name: str, padding: str | None) -> tuple[int, dict[str, float]]:
    """In one graph, for a backend that traces and rewrites it as others do, but does not compile: how many calls of fastgpt's
    operation are in it, and the shares of outputs."""
    torch.compiler.reset()
    calls = 0

    def backend(graph, example):
        nonlocal calls
        calls += sum("fastgpt.attention_forward" in str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    with torch.no_grad():
        _, found = shares(name, padding, prepared=functools.partial(torch.compile, backend=backend, fullgraph=True))
    return calls, found


def generated(model, arguments: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """32 new tokens, (B, 32) and before them, of a decoder, what was given."""
    arguments = {key: x for key, x in arguments.items() if not key.startswith("decoder")}
    if "cache" in options:
        options |= named_cache(options.pop("cache"))
    return model.generate(
        **arguments, **{"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0} | options
    )


def named_cache(cache) -> dict:
    """As an argument of models and of `generate`, which was once called past_key_values."""
    return {"cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values": cache}


def cache_of(model, **options) -> transformers.Cache:
    """Ours, for `generated`."""
    if model.config.is_encoder_decoder:
        return transformers.EncoderDecoderCache(*(ft.Cache(model.config, **options) for _ in range(2)))
    return ft.Cache(model.config, **options)


def agreement(name: str, padding: str | None) -> dict[str, bool]:
    """Cache -> whether greedy tokens with fastgpt's attention are those of eager attention and its dynamic cache."""
    model, arguments = build(name), inputs(name, padding)
    expected = generated(model, arguments)
    model.set_attn_implementation("fastgpt")
    caches = {"dynamic": {}, "static": {"cache_implementation": "static"}, "ours": {"cache": cache_of(model)}}
    return {cache: torch.equal(generated(model, arguments, **options), expected) for cache, options in caches.items()}


def unserved(name: str) -> str | None:
    """Why attention of an architecture does not go through transformers' AttentionInterface, if it does not."""
    try:
        model = build(name, "fastgpt")
    except (KeyError, ValueError) as error:
        return f'attn_implementation="fastgpt" raises {type(error).__name__}'
    with ft.record() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs(model, inputs(name))
    return None if calls else "its attention does not call what is registered"
