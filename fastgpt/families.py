"""Checkpoint families: how a folder that transformers writes maps to GPTConfig and to the decoder's weights.

A family is one `Family` entry in FAMILIES. Nothing else in the package knows a family's names.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastgpt.positions import Rope


@dataclass(frozen=True)
class Family:
    """One checkpoint family.

    config_from: transformers' config.json -> GPTConfig's fields; raises ValueError on a variant that it cannot serve.
    config_to: GPTConfig -> config.json.
    names: the decoder's module -> the checkpoint's, or several whose rows are one below the other in ours; `{i}` is the layer.
    transposed: the checkpoint's modules, without the layer, whose matrices are stored (in, out).
    prefix: what the checkpoint's names may start with or not, depending on who saved it. The output matrix and the heads
        never do.
    ignored: a pattern of names that carry no weight.
    """

    config_from: Callable[[dict], dict]
    config_to: Callable[..., dict]
    names: dict[str, str | tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    prefix: str = "model."
    ignored: str = r"\.rotary_emb\.inv_freq$"

    def checkpoint_names(self, parameter: str) -> tuple[list[str], bool]:
        """The names in the checkpoint, with prefix, of a parameter of the decoder, or of a head that it is the `model` of; and
        whether they are transposed."""
        module, _, kind = parameter.removeprefix("model.").rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        theirs = self.names[re.sub(r"\.\d+\.", ".{i}.", module, count=1)]
        theirs = [theirs] if isinstance(theirs, str) else theirs
        prefix = "" if module in ("output", "score", "classifier") else self.prefix
        names = [f"{prefix}{name.format(i=layer[1] if layer else '')}.{kind}" for name in theirs]
        return names, kind == "weight" and theirs[0] in self.transposed

    def stored_names(self, names: Iterable[str], known: set[str]) -> dict[str, str]:
        """Name with prefix -> name as stored, for every stored name that carries a weight. `known`: those with prefix."""
        kept = [name for name in names if not re.search(self.ignored, name)]
        return {name if name in known or name.startswith(self.prefix) else self.prefix + name: name for name in kept}


def _require(config: dict, family: str, **expected) -> None:
    """Raises ValueError where config.json says something else, if it says anything."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: expected {key} to be {value!r} in a {family} checkpoint, got {config[key]!r}")


# GPT-2


def _gpt2_config_from(config: dict) -> dict:
    _require(config, "gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_size": config["n_embd"],
        "intermediate_size": config.get("n_inner"),
        "dropout": config.get("resid_pdrop", 0.1),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(config, "activation_function", "gelu_new", "gpt2"),
        "cross_attention": config.get("add_cross_attention", False),
    }


def _gpt2_config_to(config) -> dict:
    return {
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "add_cross_attention": config.cross_attention,
        # transformers' defaults name tokens of OpenAI's vocabulary, which a smaller one does not have.
        "bos_token_id": None,
        "eos_token_id": None,
    }


GPT2 = Family(
    config_from=_gpt2_config_from,
    config_to=_gpt2_config_to,
    names={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks.{i}.attention_norm": "h.{i}.ln_1",
        "blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
        "blocks.{i}.attention.out": "h.{i}.attn.c_proj",
        "blocks.{i}.cross_attention_norm": "h.{i}.ln_cross_attn",
        "blocks.{i}.cross_attention.q": "h.{i}.crossattention.q_attn",
        "blocks.{i}.cross_attention.kv": "h.{i}.crossattention.c_attn",
        "blocks.{i}.cross_attention.out": "h.{i}.crossattention.c_proj",
        "blocks.{i}.mlp_norm": "h.{i}.ln_2",
        "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
        "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
        "score": "score",
        "classifier": "classifier",
    },
    transposed=frozenset(
        f"h.{{i}}.{matrix}"
        for matrix in (
            "attn.c_attn", "attn.c_proj", "crossattention.q_attn", "crossattention.c_attn", "crossattention.c_proj", "mlp.c_fc",
            "mlp.c_proj",
        )  # fmt: skip
    ),
    prefix="transformer.",
    # Causal masks that old checkpoints carry as buffers, and the output matrix, which is the token embedding.
    ignored=r"\.(attn|crossattention)\.(bias|masked_bias)$|^lm_head\.weight$",
)


# Llama, and what came of it

ACTIVATIONS = {  # transformers' name -> ours
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def _activation(config: dict, key: str, default: str, family: str) -> str:
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: expected {key} to be one of {', '.join(map(repr, ACTIVATIONS))} in a {family} checkpoint, got {name!r}"
        )
    return ACTIVATIONS[name]


def _llama_config_from(
    config: dict, family: str = "llama", *, activation: str = "hidden_act", tie: bool = False, **fields
) -> dict:
    """What all of them have in common; fields: what a family has beyond it, or instead."""
    if config.get("use_bidirectional_attention"):
        raise ValueError(f"config.json: expected use_bidirectional_attention to be false in a {family} checkpoint, got true")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attention_bias = config.get("attention_bias", False)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_size": config["hidden_size"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": _activation(config, activation, "silu", family),
        "gated": True,
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": config.get("mlp_bias", False),
        "position": "rotary",
        "rope": _rope_from(config, family, head_dim),
        "tie_embeddings": config.get("tie_word_embeddings", tie),
        **fields,
    }


def _llama_config_to(config, activation: str = "hidden_act") -> dict:
    windows = [window for window in config.windows or () if window is not None]
    result = {
        activation: {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "attention_bias": config.out_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": windows[0] if windows else None,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        # transformers' defaults name tokens that a smaller vocabulary does not have.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.rope is not None:
        result["rope_parameters"] = _rope_to(config.rope, config.head_dim)
    return result


ROPE_FIELDS = {  # ours -> transformers'
    "theta": "rope_theta", "kind": "rope_type", "factor": "factor", "original_context": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor", "fast": "beta_fast",
    "slow": "beta_slow", "truncate": "truncate", "short_factors": "short_factor", "long_factors": "long_factor",
    "attention_factor": "attention_factor",
}  # fmt: skip
ROPE_KINDS = {  # kind -> the fields that it has beyond theta and kind
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_context", "fast", "slow", "truncate", "attention_factor"),
    "longrope": ("factor", "original_context", "short_factors", "long_factors", "attention_factor"),
}


def _rope_from(config: dict, family: str, head_dim: int) -> Rope:
    """transformers 5 has all in `rope_parameters`, earlier versions in `rope_scaling` and beside it."""
    stored = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = stored.get("rope_type") or stored.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # what early checkpoints call it
        kind = "longrope"
    if kind not in ROPE_KINDS:
        known = ", ".join(map(repr, ROPE_KINDS))
        raise ValueError(f"config.json: expected the rope_type to be one of {known} in a {family} checkpoint, got {kind!r}")
    for key in ("original_max_position_embeddings", "rope_theta", "partial_rotary_factor"):
        if key in config:
            stored.setdefault(key, config[key])
    rope = {"theta": stored.get("rope_theta", 10000.0), "kind": kind}
    context = config["max_position_embeddings"]
    if kind in ("yarn", "longrope"):
        stored.setdefault("original_max_position_embeddings", context)
        if stored.get("factor") is None:
            stored["factor"] = context / stored["original_max_position_embeddings"]
        if stored.get("attention_factor") is None:
            stored["attention_factor"] = _attention_factor(stored, kind)
    for field in ROPE_KINDS[kind]:
        if stored.get(ROPE_FIELDS[field]) is not None:
            value = stored[ROPE_FIELDS[field]]
            rope[field] = tuple(value) if isinstance(value, list) else value
    return Rope(dim=int(head_dim * stored.get("partial_rotary_factor", 1.0)), **rope)


def _attention_factor(stored: dict, kind: str) -> float:
    """What transformers derives where a checkpoint says nothing."""
    factor = stored["factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(stored["original_max_position_embeddings"]))

    def magnitude(scale):
        return 0.1 * scale * math.log(factor) + 1.0

    if stored.get("mscale") and stored.get("mscale_all_dim"):
        return magnitude(stored["mscale"]) / magnitude(stored["mscale_all_dim"])
    return magnitude(1.0)


def _rope_to(rope: Rope, head_dim: int) -> dict:
    fields = {field: getattr(rope, field) for field in ("theta", "kind", *ROPE_KINDS[rope.kind])}
    stored = {ROPE_FIELDS[name]: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return stored | ({"partial_rotary_factor": rope.dim / head_dim} if rope.dim != head_dim else {})


LLAMA_NAMES = {
    "token_embedding": "embed_tokens",
    "blocks.{i}.attention_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attention.qkv": tuple(f"layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{i}.attention.out": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "blocks.{i}.mlp.down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
    "output": "lm_head",
    "score": "score",
    "classifier": "score",
}
LLAMA = Family(_llama_config_from, _llama_config_to, LLAMA_NAMES)


def _mistral_config_from(config):
    window = config.get("sliding_window", 4096)
    return _llama_config_from(config, "mistral", windows=_windows(config, [window is not None] * config["num_hidden_layers"]))


MISTRAL = Family(_mistral_config_from, _llama_config_to, LLAMA_NAMES)


def _windows(config: dict, sliding: list[bool]) -> tuple[int | None, ...] | None:
    """The window in layers that have it, as config.json says or else as `sliding` does. None where no layer has one."""
    types = config.get("layer_types")
    sliding = sliding if types is None else [kind == "sliding_attention" for kind in types]
    return tuple(config.get("sliding_window", 4096) if slides else None for slides in sliding) if any(sliding) else None


def _qwen_windows(config: dict):
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    used = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    if not used:
        return None
    return _windows(config, [layer >= first for layer in range(layers)])


def _qwen2_config_from(config):
    return _llama_config_from(config, "qwen2", qkv_bias=True, out_bias=False, windows=_qwen_windows(config))


def _qwen_config_to(config):
    windows = config.windows or (None,) * config.num_layers
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return _llama_config_to(config) | {"layer_types": types, "use_sliding_window": any(windows)}


QWEN2 = Family(_qwen2_config_from, _qwen_config_to, LLAMA_NAMES)


def _qwen3_config_from(config):
    config = {"head_dim": 128, **config}
    return _llama_config_from(config, "qwen3", qk_norm=True, windows=_qwen_windows(config))


QWEN3 = Family(
    _qwen3_config_from,
    _qwen_config_to,
    LLAMA_NAMES
    | {f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"},
)  # fmt: skip


def _phi3_config_from(config):
    _require(config, "phi3", embd_pdrop=config.get("resid_pdrop", 0.0))
    return _llama_config_from(
        {"rms_norm_eps": 1e-5, **config}, "phi3", dropout=config.get("resid_pdrop", 0.0),
        windows=_windows(config, [config.get("sliding_window") is not None] * config["num_hidden_layers"]),
    )  # fmt: skip


def _phi3_config_to(config):
    result = _llama_config_to(config) | {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout}
    parameters = result.get("rope_parameters", {})
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if key in parameters:
            result[key] = parameters[key]
    return result


PHI3 = Family(
    _phi3_config_from,
    _phi3_config_to,
    LLAMA_NAMES
    | {"blocks.{i}.attention.qkv": "layers.{i}.self_attn.qkv_proj", "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_up_proj"},
)


def _gemma_config_from(config, family="gemma", activation="hidden_act", **fields):
    if config.get(activation) == "gelu":  # which early checkpoints say, and do not mean
        config = config | {activation: "gelu_pytorch_tanh"}
    defaults = {activation: "gelu_pytorch_tanh", "head_dim": 256, "rms_norm_eps": 1e-6}
    return _llama_config_from(
        defaults | config, family, activation=activation, tie=True, norm_offset=1.0,
        embedding_scale=math.sqrt(config["hidden_size"]), **fields,
    )  # fmt: skip


GEMMA = Family(_gemma_config_from, _llama_config_to, LLAMA_NAMES)


def _gemma2_config_from(config):
    return _gemma_config_from(
        config, "gemma2", "hidden_activation", post_norms=True,
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
        windows=_windows(config, [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]),
    )  # fmt: skip


def _gemma2_config_to(config):
    types = ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_layers)]
    return _llama_config_to(config, "hidden_activation") | {
        "layer_types": types,
        "query_pre_attn_scalar": _as_integer((config.attention_scale or config.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _as_integer(x: float) -> int | float:
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x


GEMMA2 = Family(
    _gemma2_config_from,
    _gemma2_config_to,
    LLAMA_NAMES
    | {
        "blocks.{i}.attention.post_norm": "layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp_norm": "layers.{i}.pre_feedforward_layernorm",
        "blocks.{i}.mlp.post_norm": "layers.{i}.post_feedforward_layernorm",
    },
)


# What transformers has no architecture for: an encoder, a bigram model, any other mixture


class _OwnNames(dict):
    def __missing__(self, module: str) -> str:
        return module


def _own_config_from(config: dict) -> dict:
    fields = dict(config["fields"])
    for name in ("rope", "windows"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name]) if name == "windows" else Rope(**_tuples(fields[name]))
    return fields


def _tuples(fields: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _own_config_to(config) -> dict:
    return {"fields": dataclasses.asdict(config)}


OWN = Family(_own_config_from, _own_config_to, _OwnNames(), prefix="", ignored=r"$^")

ARCHITECTURES = {  # what the names of transformers' classes begin with, and ours
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "gemma": "Gemma",
    "gemma2": "Gemma2", "fastgpt": "FastGPT",
}  # fmt: skip
HEADS = {  # and what they end with -> the class here that has this head
    "ForSequenceClassification": "SequenceClassifier",
    "ForTokenClassification": "TokenClassifier",
}
FAMILIES = {
    "gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "phi3": PHI3, "gemma": GEMMA,
    "gemma2": GEMMA2, "fastgpt": OWN,
}  # fmt: skip


def architecture(family: str, head: str | None = None) -> str:
    """The name of the class with one of HEADS, or with none: a language model."""
    return ARCHITECTURES[family] + (head or ("LMHeadModel" if family == "gpt2" else "ForCausalLM"))


def family_of(config, preferred: str | None = None) -> str:
    """The name of the first family, `preferred` before all others, whose config.json can say all that a GPTConfig does."""
    names = list(FAMILIES)
    if preferred in FAMILIES:
        names.insert(0, preferred)
    return next(name for name in names if _can_hold(FAMILIES[name], config))


def _can_hold(family: Family, config) -> bool:
    try:
        return type(config)(**family.config_from(family.config_to(config))) == config
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return False
