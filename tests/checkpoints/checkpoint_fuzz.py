"""Loads damaged checkpoints, in a process of its own with a limit on its memory: python checkpoint_fuzz.py FOLDER SEED CONFIGS FILES

Prints {"configs": counts, "files": counts, "failures": [...]}. A checkpoint must load, and then compute finite logits, or raise
ValueError, or OSError, that names what is wrong.
"""

import copy
import json
import random
import re
import resource
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1]))
from quantized_folders import quantize_folder  # noqa: E402

import fastgpt
from fastgpt import (
    GPT,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    SequenceClassifier,
)
from fastgpt.checkpoints.families import ENCODERS, FAMILIES

MEMORY = 1 << 30  # bytes beyond what the process has when it starts
LLAMA = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 10000.0, "eos_token_id": [2, 3],
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
QWEN = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
DROPPING, EQUAL, HALF = {"residual_dropout": 0.1, "embedding_dropout": 0.1}, {"head_dim": 4}, {"partial_rotary_factor": 0.5}
BOTH_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default"},
}
GPT_NEOX = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
QWEN_EXPERTS = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "use_sliding_window": False,
}  # fmt: skip
LATENT = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "head_dim")} | {
    "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 3, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
BERT = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
T5 = {
    "vocab_size": 33, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
OWN_STACK = {
    "vocab_size": 33, "context_length": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 16, "norm_first": False,
    "position": "relative", "relative_buckets": 8, "relative_max_distance": 16,
}  # fmt: skip
CONFIGS = [
    {
        "model_type": "gpt2", "vocab_size": 33, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_inner": 24,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    },
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | LLAMA | {
        "rope_scaling": {
            "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    {"model_type": "llama"} | LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
    {"model_type": "mistral", "sliding_window": 8} | LLAMA,
    {"model_type": "qwen2"} | LLAMA | QWEN | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "qwen3"} | LLAMA | QWEN | {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
            "rope_theta": 1e6, "attention_factor": 1.1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True,
        },
    },
    {"model_type": "phi3", "sliding_window": 8, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16} | LLAMA | {
        "rope_parameters": LONG, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    {"model_type": "gemma"} | LLAMA | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    {
        "model_type": "gemma2", "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
    } | LLAMA,
    {"model_type": "starcoder2", "norm_epsilon": 1e-5, "use_bias": True, "sliding_window": 8} | LLAMA | DROPPING | EQUAL,
    {"model_type": "stablelm", "use_qkv_bias": True, "use_parallel_residual": True} | LLAMA | EQUAL | HALF,
    {
        "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25,
        "logits_scaling": 8.0,
    } | LLAMA,
    {"model_type": "olmo2"} | LLAMA,
    {"model_type": "olmo3", "sliding_window": 8, "rope_parameters": BOTH_ROPES} | LLAMA,
    {"model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2} | LLAMA | QWEN,
    {
        "model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0,
    } | LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "hidden_activation": "gelu_pytorch_tanh"},
    {
        "model_type": "gpt_neox", "use_parallel_residual": True, "layer_norm_eps": 1e-5, "rotary_pct": 0.5, "rotary_emb_base": 1e4,
        "hidden_dropout": 0.1, "attention_bias": True,
    } | {name: LLAMA[name] for name in LLAMA if name in GPT_NEOX},
    {"model_type": "phi", "qk_layernorm": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1} | LLAMA | EQUAL | HALF,
    {"model_type": "glm4"} | LLAMA | HALF | {"attention_bias": True},
    {
        "model_type": "cohere2", "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "sliding_window": 8, "sliding_window_pattern": 2,
    } | LLAMA | EQUAL | {"tie_word_embeddings": True},
    {"model_type": "bert", "architectures": ["BertForMaskedLM"]} | BERT,
    {"model_type": "roberta", "pad_token_id": 1} | BERT,
    {
        "model_type": "distilbert", "vocab_size": 33, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "dropout": 0.1,
        "max_position_embeddings": 32, "activation": "gelu", "sinusoidal_pos_embds": False,
    },
    {
        "model_type": "modernbert", "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 2,
        "local_attention": 8, "norm_eps": 1e-5, "classifier_pooling": "mean", "hidden_activation": "gelu", "decoder_bias": True,
        "classifier_bias": False, "mlp_dropout": 0.1, "layer_types": ["full_attention", "sliding_attention"],
    } | {name: LLAMA[name] for name in LLAMA if name in GPT_NEOX},
    {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]} | T5,
    {"model_type": "t5", "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False} | T5 | {"tie_word_embeddings": False},
    {"model_type": "mt5", "architectures": ["MT5EncoderModel"]} | T5,
    {
        "model_type": "fastgpt_encoder_decoder",
        "fields": {
            "encoder": OWN_STACK | {"embedding_norm": False}, "decoder": OWN_STACK | {"cross_attention": True}, "start_token": 3,
            "share_embedding": False,
        },
    },
    {
        "model_type": "fastgpt_encoder",
        "fields": {
            "vocab_size": 33, "context_length": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 16, "norm": "rms",
            "position": "rotary", "rope": {"dim": 8}, "windows": [4, None], "token_types": 2, "norm_first": True,
        },
    },
    {
        "model_type": "fastgpt",
        "fields": {
            "vocab_size": 33, "context_length": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 16, "norm": "rms",
            "position": "rotary", "rope": {"dim": 8, "kind": "linear", "factor": 2.0}, "windows": [4, None], "dropout": 0.1,
        },
    },
    {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8} | LLAMA,
    {
        "model_type": "qwen2_moe", "num_experts": 3, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 2,
        "qkv_bias": True,
    } | QWEN_EXPERTS | LLAMA | EQUAL,
    {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [0]} | QWEN_EXPERTS | LLAMA,
    {
        "model_type": "gpt_oss", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8, "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    } | LLAMA | {"attention_bias": True},
    {"model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "clip_qkv": None} | LLAMA,
    {
        "model_type": "granitemoe", "num_local_experts": 3, "num_experts_per_tok": 1, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.25, "logits_scaling": 8.0,
    } | LLAMA,
    {
        "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "q_lora_rank": None,
        "routed_scaling_factor": 2.0,
    } | LATENT,
    {
        "model_type": "deepseek_v3", "n_group": 2, "topk_group": 2, "q_lora_rank": 4, "norm_topk_prob": True,
        "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_bias": True,
    } | {name: value for name, value in LATENT.items() if name != "attention_bias"},
]  # fmt: skip
NUMBERS = [
    0, 1, 2, 3, -1, 5, 7, 2**31 - 1, 2**31, 2**63, 2**80, 10**300, -(2**31), 0.0, -0.0, 0.5, 1.0, 1e-46, 1e-300, 1e38, 1e300,
    -1e300, 1.5, 255, 4096, 65536,
]  # fmt: skip
OTHERS = [
    None, True, False, "", "x", "8", "NaN", [], [1], [None], [[]], {}, {"a": 1}, {"rope_type": "yarn"}, ["full_attention"], "\ud800",
    ["sliding_attention", "sliding_attention"], ["full_attention", []], [1e300, 0], [0.0, 0.0], "linear", "su", "default",
]  # fmt: skip
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x1", "'a'", "", "[" * 3000, '"\\ud800"', "01", "nul"]
ADDED = {
    "quantization_config": {"quant_method": "fp8"}, "num_experts": 8, "use_bidirectional_attention": True, "is_encoder_decoder": True,
    "no_rope_layers": [1, 0], "attention_chunk_size": 8, "residual_multiplier": 0.5, "sliding_window": 0, "layer_types": [],
    "architectures": "LlamaForCausalLM", "rope_parameters": {"full_attention": {"rope_type": "default"}}, "alibi": True,
    "rope_scaling": {"rope_type": "linear", "factor": 0}, "partial_rotary_factor": 0.3, "attention_bias": True,
}  # fmt: skip
NAMED = re.compile(
    r"model: \S+(config\.json: .*expected | is damaged: | (lacks|has unexpected|has misshapen) weights: |: (.*: )?expected )",
    re.DOTALL,
)


def loader_of(config: dict) -> type:
    alone = str(config.get("architectures", "")).endswith("EncoderModel']")
    return Encoder if alone else getattr(fastgpt, FAMILIES[config["model_type"]].loader)


def new_model(config: dict) -> GPT | Encoder | EncoderDecoder:
    """A model with random weights; an encoder with a masked-language head, if its family has one."""
    name, loader = config["model_type"], loader_of(config)
    fields = FAMILIES[ENCODERS[name] if loader is Encoder and name in ENCODERS else name].config_from(config)
    if loader is EncoderDecoder:
        stacks = {"encoder": EncoderConfig(**fields["encoder"]), "decoder": GPTConfig(**fields["decoder"])}
        return EncoderDecoder(EncoderDecoderConfig(**fields | stacks))
    return Encoder(EncoderConfig(**fields, masked_head=name not in ENCODERS)) if loader is Encoder else GPT(GPTConfig(**fields))


def containers(value) -> list:
    """The objects and lists in a JSON value that have an entry."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if inner else []) + [found for entry in inner for found in containers(entry)]


def damaged_config(config: dict, draw: random.Random) -> str:
    """config.json after one to three changes."""
    config, literal = copy.deepcopy(config), None
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.choice(containers(config) or [config])
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            continue
        key, change = draw.choice(keys), draw.randrange(8)
        if change == 0:
            del place[key]
        elif change == 1:
            place[key] = draw.choice(NUMBERS)
        elif change == 2:
            place[key] = copy.deepcopy(draw.choice(OTHERS))
        elif change == 3:
            place[key] = copy.deepcopy(draw.choice(([place[key]], {"x": place[key]}, str(place[key]), [place[key]] * 3)))
        elif change == 4:
            place[key] = literal = "@LITERAL@"
        elif change == 5:
            name = draw.choice(list(ADDED))
            config[name] = copy.deepcopy(ADDED[name])
        elif change == 6:
            donor = draw.choice(CONFIGS)
            name = draw.choice(list(donor))
            config[name] = copy.deepcopy(donor[name])
        elif isinstance(place[key], (int, float)) and place[key] is not True and place[key] is not False:
            place[key] = place[key] * draw.choice((-1, 0, 0.5, 1.5, 3)) + draw.choice((0, 1))
    text = json.dumps(config)
    if literal:
        text = text.replace('"@LITERAL@"', draw.choice(LITERALS))
    change = draw.randrange(20)
    if change == 0:
        text = text[: draw.randrange(len(text))]
    elif change == 1:
        name = draw.choice(list(config) or ["x"])
        text = text[:-1] + f", {json.dumps(name)}: 1}}"
    elif change == 2:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice('{}[]",:0\x00é\\') + text[at + 1 :]
    return text


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def with_header(path: Path, edit) -> None:
    """Rewrites a file with what `edit` makes of its header, bytes -> bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = edit(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def damage_files(folder: Path, draw: random.Random) -> str:
    """Changes the weights of a checkpoint in place; returns how."""
    path = draw.choice(weight_files(folder))
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = draw.choice([name for name in header if name != "__metadata__"])
    index = folder / "model.safetensors.index.json"
    ways = [
        "cut",
        "longer",
        "header byte",
        "data byte",
        "length",
        "entry",
        "twice",
        "tensor",
        "rename",
        "drop",
        "gone",
        "folder",
        "link",
    ]
    way = draw.choice(ways + ["index"] * 4 * index.is_file())
    if way == "cut":
        path.write_bytes(data[: draw.choice((0, 4, 8, 20, len(data) - 1, draw.randrange(len(data))))])
    elif way == "longer":
        path.write_bytes(data + bytes(draw.choice((1, 8, 4096))))
    elif way == "header byte":
        at = 8 + draw.randrange(int.from_bytes(data[:8], "little"))
        path.write_bytes(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
    elif way == "data byte":
        at = draw.randrange(8 + int.from_bytes(data[:8], "little"), len(data))
        path.write_bytes(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
    elif way == "length":
        path.write_bytes(draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little") + data[8:])
    elif way == "entry":
        key = draw.choice(("dtype", "shape", "data_offsets"))
        garbage = [
            None,
            "F8_E4M3",
            "I64",
            "BOOL",
            "F32",
            "X",
            [],
            [2**62, 4],
            [0],
            [-1],
            [[1]],
            [1.5],
            [4, 0],
            [0, 2**64],
            "1",
            {},
        ]
        header[name] = header[name] | {key: draw.choice(garbage)}
        with_header(path, lambda _: json.dumps(header).encode())
    elif way == "twice":
        with_header(path, lambda old: old.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}".encode())
    elif way in ("tensor", "rename", "drop"):
        weights = load_file(path)
        weight = weights.pop(name)
        if way == "tensor":
            changes = (
                lambda: weight.to(torch.int8), lambda: weight.bool(), lambda: weight.to(torch.float8_e4m3fn), weight.half,
                weight.double, weight.bfloat16, lambda: weight[:-1], lambda: weight[None], lambda: weight.sum(),
                lambda: weight[:0], lambda: torch.full_like(weight, draw.choice((torch.nan, torch.inf)) if weight.dtype.is_floating_point else 255),
            )  # fmt: skip
            weights[name] = draw.choice(changes)().contiguous()
        elif way == "rename":
            weights[draw.choice(("x", "model." + name, name + ".weight", "layers.9999999999.x", "", "\n"))] = weight
        save_file(weights, path)
    elif way == "gone":
        path.unlink()
    elif way == "folder":
        path.unlink()
        path.mkdir()
    elif way == "link":
        path.unlink()
        path.symlink_to(draw.choice(("/etc/hostname", "nowhere", path.name, "..", "/dev/zero")))
    else:
        shards = json.loads(index.read_text())
        shard = draw.choice(
            ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", "C:\\x.safetensors", 5, None, []]
        )
        entry = draw.choice((shard, path.name, "missing.safetensors"))
        change = draw.randrange(4)
        if change == 0:
            shards["weight_map"] = draw.choice(({}, [], None, "x", {name: entry}))
        elif change == 1:
            shards = draw.choice(({}, shards["weight_map"], [shards]))
        else:
            shards["weight_map"][draw.choice((name, "new"))] = entry
        index.write_text(json.dumps(shards))
    return way


@torch.inference_mode()
def outcome(folder: Path, kind: str, head: bool = False, loader: type = GPT) -> tuple[str, str | None]:
    """What loading came to, and what is wrong with that, if anything is."""
    try:
        model = (SequenceClassifier if head else loader).from_pretrained(folder)
    except (ValueError, OSError) as error:
        names = isinstance(error, OSError) and str(folder) in str(error) or NAMED.match(str(error))
        return type(error).__name__, None if names else f"does not name what is wrong: {str(error)[:300]}"
    except BaseException as error:
        return type(error).__name__, f"{type(error).__name__}: {str(error)[:300]}"
    if head:
        return "loaded", None
    tokens = min(5, model.config.context_length)
    try:
        ids = torch.arange(tokens)[None] % model.config.vocab_size
        if loader is EncoderDecoder:
            logits = model(ids % model.config.encoder.vocab_size, ids[:, : model.config.decoder.context_length])
        else:
            logits = (model.encode if loader is Encoder and not model.config.masked_head else model)(ids)
    except Exception as error:
        return "loaded", f"cannot compute: {type(error).__name__}: {str(error)[:300]}"
    finite = bool(logits.isfinite().all()) or kind == "data byte"  # weights of any size may come of that
    return "loaded", None if finite else "logits are not finite"


def write_valid(folder: Path) -> list[Path]:
    """A checkpoint of each of CONFIGS, and one in two files."""
    folders = []
    for i, config in enumerate(CONFIGS):
        model = new_model(config)
        folders.append(folder / f"valid{i}")
        model.save_pretrained(folders[-1])
        (folders[-1] / "config.json").write_text(json.dumps(config))
    shutil.copytree(folders[1], folder / "sharded")
    weights = load_file(folder / "sharded" / "model.safetensors")
    (folder / "sharded" / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        save_file({name: x for name, x in weights.items() if weight_map[name] == shard}, folder / "sharded" / shard)
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folders


def write_quantized(folder: Path) -> list[Path]:
    """A checkpoint as each of these writes it."""
    wide = LLAMA | {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    folders = []
    for method, symmetric in (("gptq", True), ("awq", False), ("compressed-tensors", False), ("own", True)):
        folders.append(folder / method)
        model = new_model(wide)
        model.save_pretrained(folders[-1])
        if method == "own":
            GPT.from_pretrained(folders[-1], weights="int4").save_pretrained(folders[-1])
        else:
            (folders[-1] / "config.json").write_text(json.dumps(wide))
            quantize_folder(folders[-1], method, 4, 32, symmetric)
    return folders


def main(folder: Path, seed: int, configs: int, files: int) -> dict:
    draw, counts, failures = random.Random(seed), {"configs": Counter(), "files": Counter()}, []
    folders, quantized = write_valid(folder), write_quantized(folder)
    all_folders = [*folders, *quantized]
    configurations = [*CONFIGS, *(json.loads((path / "config.json").read_text()) for path in quantized)]
    loaders = [loader_of(config) for config in configurations]
    for i, (valid, loader) in enumerate(zip([*all_folders, folder / "sharded"], [*loaders, GPT])):
        found, problem = outcome(valid, "valid", loader=loader)
        if found != "loaded" or problem:
            failures.append(f"valid checkpoint {i}: {found}, {problem}")
    others = {valid: loader for valid, loader in zip(all_folders, loaders) if loader is not GPT}
    with_experts = [valid for valid, config in zip(folders, CONFIGS) if "num_experts_per_tok" in config]
    used = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for i in range(configs):
        at = i % len(configurations)
        text = damaged_config(configurations[at], draw)
        (all_folders[at] / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        found, problem = outcome(all_folders[at], "config", head=i % 7 == 0, loader=loaders[at])
        counts["configs"][found] += 1
        if problem:
            failures.append(f"config {i}: {problem}: {text[:2000]}")
    for config, valid in zip(configurations, all_folders):
        (valid / "config.json").write_text(json.dumps(config))
    for i in range(files):
        damaged = folder / "damaged"
        valid = draw.choice((*folders[:3], *with_experts, folder / "sharded", *quantized, *others))
        shutil.copytree(valid, damaged)
        kind = damage_files(damaged, draw)
        found, problem = outcome(damaged, kind, loader=others.get(valid, GPT))
        counts["files"][found] += 1
        if problem:
            failures.append(f"file {i}, {kind}: {problem}")
        shutil.rmtree(damaged)
    return counts | {"failures": failures}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
