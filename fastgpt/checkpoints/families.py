"""Checkpoint families: how a folder that transformers writes maps to GPTConfig and to the decoder's weights.

A family is one `Family` entry in FAMILIES. Nothing else in the package knows a family's names.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastgpt import schema
from fastgpt.model.rope import MAX_POSITIONS, ROPE_SCHEMA, Rope
from fastgpt.ops.linear import ACTIVATIONS
from fastgpt.schema import OMITTED, Field, choice, flag, integer, mapping, number, only, several, unsupported

# Ranges of sizes. Numbers of elements and bytes of every matrix in them are integers of 64 bits.
VOCABULARY, POSITIONS = integer(1, 2**31 - 1), integer(1, MAX_POSITIONS)
LAYERS, HEADS_EACH, WIDTH, MLP_WIDTH = integer(0, 2**16), integer(1, 2**16), integer(1, 2**20), integer(1, 2**24)
MAX_HEAD_DIM = 576  # of `fastgpt.attention`
EPSILON = {"least": 1e-30, "most": 1e6}  # a row of zeros has no norm without it
SCALE = {"least": 1e-6, "most": 1e6}  # of what a number is multiplied or capped with
ACTIVATION_NAMES = {  # transformers' name -> ours
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def _maybe(size: Field, default=OMITTED) -> Field:
    return Field(lambda name, value: None if value is None else size.check(name, value), default)


DECODER_SCHEMA = {  # GPTConfig's fields
    "vocab_size": VOCABULARY,
    "context_length": POSITIONS,
    "num_layers": LAYERS,
    "num_heads": HEADS_EACH,
    "hidden_size": WIDTH,
    "dropout": number(OMITTED, least=0, below=1),
    "norm_eps": number(OMITTED, **EPSILON),
    "num_kv_heads": _maybe(HEADS_EACH),
    "head_dim": _maybe(integer(1, 2**16)),
    "intermediate_size": _maybe(MLP_WIDTH),
    "norm": choice(("layer", "rms"), OMITTED),
    "norm_offset": number(OMITTED, least=-1e6, most=1e6),
    "post_norms": flag(OMITTED),
    "activation": choice(ACTIVATIONS, OMITTED),
    "gated": flag(OMITTED),
    "qkv_bias": flag(OMITTED),
    "out_bias": flag(OMITTED),
    "mlp_bias": flag(OMITTED),
    "qk_norm": flag(OMITTED),
    "position": choice(("learned", "sinusoidal", "rotary", None), OMITTED),
    "windows": several(_maybe(POSITIONS), OMITTED, optional=True),
    "causal": flag(OMITTED),
    "cross_attention": flag(OMITTED),
    "attention_scale": number(OMITTED, optional=True, **SCALE),
    "attention_softcap": number(OMITTED, optional=True, **SCALE),
    "logit_softcap": number(OMITTED, optional=True, **SCALE),
    "embedding_scale": number(OMITTED, optional=True, **SCALE),
    "tie_embeddings": flag(OMITTED),
}

UNPREFIXED = ("output", "score", "classifier")  # modules of ours: the output matrix and the heads


@dataclass(frozen=True)
class Family:
    """One checkpoint family.

    schema: what its config.json may say.
    fields_from: config.json, checked by the schema and with its defaults -> GPTConfig's fields; raises ValueError that begins
        with the entry's name on what does not fit together.
    config_to: GPTConfig -> config.json.
    names: the decoder's module -> the checkpoint's, or several whose rows are one below the other in ours; `{i}` is the layer.
    transposed: the checkpoint's modules, without the layer, whose matrices are stored (in, out).
    prefix: what the checkpoint's names may start with or not, depending on who saved it. The output matrix and the heads
        never do.
    ignored: a pattern of names that carry no weight.
    """

    schema: Mapping[str, Field]
    fields_from: Callable[[dict], dict]
    config_to: Callable[..., dict]
    names: dict[str, str | tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    prefix: str = "model."
    ignored: str = r"\.rotary_emb\.inv_freq$"

    def config_from(self, config: dict) -> dict:
        """config.json -> GPTConfig's fields. Raises ValueError that begins with the name of an entry that is missing, wrong or
        of a variant that cannot be served."""
        return self.fields_from(schema.read(self.schema, config))

    def checkpoint_names(self, parameter: str) -> tuple[list[str], bool]:
        """The names in the checkpoint, with prefix, of a parameter of the decoder, or of a head that it is the `model` of; and
        whether they are transposed."""
        module, _, kind = parameter.removeprefix("model.").rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        theirs = self.names[re.sub(r"\.\d+\.", ".{i}.", module, count=1)]
        theirs = [theirs] if isinstance(theirs, str) else theirs
        prefix = "" if module in UNPREFIXED else self.prefix
        names = [f"{prefix}{name.format(i=layer[1] if layer else '')}.{kind}" for name in theirs]
        return names, kind == "weight" and theirs[0] in self.transposed

    def with_prefix(self, name: str) -> str | None:
        """A stored name as it is with the prefix, or None if it carries no weight."""
        if re.search(self.ignored, name):
            return None
        bare = {self.names[module] + "." for module in UNPREFIXED if module in self.names}
        return name if name.startswith((self.prefix, *bare)) else self.prefix + name

    @property
    def layer_pattern(self) -> str:
        """Of stored names of a layer's weights, with or without prefix; its group is the number of the layer."""
        first = self.names["blocks.{i}.attention_norm"].partition("{i}")[0]
        return f"^(?:{re.escape(self.prefix)})?{re.escape(first)}(\\d{{1,9}})\\."


# What all families have in common

# What changes results where it is said, in any family but those that override it.
NOT_SUPPORTED = {
    name: unsupported()
    for name in (
        "quantization_config", "compression_config", "use_bidirectional_attention", "is_encoder_decoder",
        "add_cross_attention", "alibi", "use_alibi", "use_parallel_residual", "parallel_attn", "use_qk_norm", "qk_layernorm",
        "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq", "rope_local_theta",
        "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "kv_lora_rank",
        "q_lora_rank", "sliding_window",
    )
} | {
    "num_experts": unsupported(0, 1),
    "num_local_experts": unsupported(0, 1),
    "n_routed_experts": unsupported(0),
    "embedding_multiplier": unsupported(1, 1.0),
    "residual_multiplier": unsupported(1, 1.0),
    "logits_scaling": unsupported(1, 1.0),
    "pruned_heads": unsupported({}),
    "mlp_bias": unsupported(),
}  # fmt: skip
TOKEN_ID = integer(-(2**31), 2**31 - 1)  # below 0: no token
TOKEN_IDS = {
    name: several(TOKEN_ID, None, optional=True, or_one=True) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
}
DROPOUT = number(0.0, least=0, below=1)
UNUSED_DROPOUT = number(0.0, least=0, most=1, optional=True)  # of attention weights in training
COMMON = NOT_SUPPORTED | TOKEN_IDS


def _expect(condition: bool, name: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


# GPT-2

GPT2_SCHEMA = COMMON | {
    "vocab_size": VOCABULARY,
    "n_positions": POSITIONS,
    "n_layer": LAYERS,
    "n_head": HEADS_EACH,
    "n_embd": WIDTH,
    "n_inner": _maybe(MLP_WIDTH, None),
    "activation_function": choice(ACTIVATION_NAMES, "gelu_new"),
    "embd_pdrop": DROPOUT,
    "resid_pdrop": number(0.1, least=0, below=1),
    "attn_pdrop": UNUSED_DROPOUT,
    "layer_norm_epsilon": number(1e-5, **EPSILON),
    "scale_attn_weights": only(True, True),
    "scale_attn_by_inverse_layer_idx": unsupported(),
    "add_cross_attention": flag(False),
    "tie_word_embeddings": flag(True),
}


def _head_dim(config: dict, hidden: str, heads: str) -> int:
    """What config.json says, or else hidden size / heads."""
    head_dim = config.get("head_dim")
    if head_dim is None:
        _expect(config[hidden] % config[heads] == 0, hidden, f"a multiple of {heads}={config[heads]}", config[hidden])
        head_dim = config[hidden] // config[heads]
        _expect(head_dim <= MAX_HEAD_DIM, hidden, f"at most {MAX_HEAD_DIM} for each of {heads}={config[heads]}", config[hidden])
    return head_dim


def _gpt2_fields_from(config: dict) -> dict:
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_size": config["n_embd"],
        "head_dim": _head_dim(config, "n_embd", "n_head"),
        "intermediate_size": config["n_inner"],
        "dropout": config["resid_pdrop"],
        "norm_eps": config["layer_norm_epsilon"],
        "activation": ACTIVATION_NAMES[config["activation_function"]],
        "cross_attention": config["add_cross_attention"],
        "tie_embeddings": config["tie_word_embeddings"],
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
        "tie_word_embeddings": config.tie_embeddings,
        # transformers' defaults name tokens of OpenAI's vocabulary, which a smaller one does not have.
        "bos_token_id": None,
        "eos_token_id": None,
    }


GPT2 = Family(
    schema=GPT2_SCHEMA,
    fields_from=_gpt2_fields_from,
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
        "output": "lm_head",
        "score": "score",
        "classifier": "classifier",
    },
    transposed=frozenset(
        f"h.{{i}}.{matrix}"
        for matrix in (
            "attn.c_attn",
            "attn.c_proj",
            "crossattention.q_attn",
            "crossattention.c_attn",
            "crossattention.c_proj",
            "mlp.c_fc",
            "mlp.c_proj",
        )  # fmt: skip
    ),
    prefix="transformer.",
    # Causal masks that old checkpoints carry as buffers.
    ignored=r"\.(attn|crossattention)\.(bias|masked_bias)$",
)


# Llama, and what came of it

LLAMA_SCHEMA = COMMON | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS_EACH,
    "num_key_value_heads": _maybe(HEADS_EACH, None),
    "hidden_size": WIDTH,
    "head_dim": _maybe(integer(1, MAX_HEAD_DIM), None),
    "intermediate_size": MLP_WIDTH,
    "rms_norm_eps": number(1e-6, **EPSILON),
    "hidden_act": choice(ACTIVATION_NAMES, "silu"),
    "attention_bias": flag(False),
    "mlp_bias": flag(False),
    "attention_dropout": UNUSED_DROPOUT,
    "tie_word_embeddings": flag(False),
    "layer_types": several(choice(("full_attention", "sliding_attention")), None, optional=True),
    # Rope. transformers 5 has all of it in `rope_parameters`, earlier versions in `rope_scaling` and beside it.
    "rope_parameters": mapping(None, optional=True),
    "rope_scaling": mapping(None, optional=True),
    "rope_theta": ROPE_SCHEMA["theta"],
    "partial_rotary_factor": unsupported(1, 1.0),
    "original_max_position_embeddings": integer(2, MAX_POSITIONS, OMITTED),
}


def _llama_fields_from(config: dict, *, activation: str = "hidden_act", rope_schema: Mapping | None = None, **fields) -> dict:
    """What all of them have in common; rope_schema, fields: what a family has beyond it, or instead."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    _expect(
        kv_heads is None or heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads={heads}", kv_heads
    )
    head_dim = _head_dim(config, "hidden_size", "num_attention_heads")
    if "windows" not in fields:
        fields["windows"] = _windows(config, None)
    rope, context_length = _rope_from(config, head_dim, rope_schema or STORED_ROPE_SCHEMA)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": context_length,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "hidden_size": config["hidden_size"],
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "norm": "rms",
        "norm_eps": config["rms_norm_eps"],
        "activation": ACTIVATION_NAMES[config[activation]],
        "gated": True,
        "qkv_bias": bool(config["attention_bias"]),
        "out_bias": bool(config["attention_bias"]),
        "mlp_bias": bool(config["mlp_bias"]),
        "position": "rotary",
        "rope": rope,
        "tie_embeddings": config["tie_word_embeddings"],
        **fields,
    }


def _windows(config: dict, window: int | None, sliding: list[bool] | None = None) -> tuple[int | None, ...] | None:
    """The window in layers that have it, as layer_types says or else as `sliding` does. None where no layer has one.

    sliding: which layers have it by default; None: all or none, which layer_types cannot change.
    """
    layers, types = config["num_hidden_layers"], config["layer_types"]
    uniform = sliding is None
    sliding = [window is not None] * layers if uniform else sliding
    if types is not None:
        _expect(len(types) == layers, "layer_types", f"{layers} of them, as many as num_hidden_layers", list(types))
        stored = [kind == "sliding_attention" for kind in types]
        if uniform:
            same = "sliding_attention" if window is not None else "full_attention"
            _expect(stored == sliding, "layer_types", f"only {same!r}, since sliding_window is {window!r}", list(types))
        sliding = stored
    if not any(sliding):
        return None
    _expect(window is not None, "sliding_window", "an integer >= 1, since layers have sliding_attention", window)
    return tuple(window if slides else None for slides in sliding)


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
    "dynamic": ("factor",),
    "llama3": ("factor", "original_context", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_context", "fast", "slow", "truncate", "attention_factor"),
    "longrope": ("factor", "original_context", "short_factors", "long_factors", "attention_factor"),
}
ROPE_NEEDED = {  # kind -> the fields for which there is no default
    "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_frequency_factor", "high_frequency_factor"),
    "longrope": ("short_factors", "long_factors"),
}  # fmt: skip
ROPE_TYPES = (*ROPE_KINDS, None)
STORED_ROPE_SCHEMA = {theirs: _maybe(ROPE_SCHEMA[ours]) for ours, theirs in ROPE_FIELDS.items()} | {
    "rope_type": choice(ROPE_TYPES, OMITTED),
    "type": choice(ROPE_TYPES, OMITTED),
    "partial_rotary_factor": LLAMA_SCHEMA["partial_rotary_factor"],
    "truncate": ROPE_SCHEMA["truncate"],
    "beta_fast": number(OMITTED, least=0, most=1e6, optional=True),  # 0, as none: the default
    "beta_slow": number(OMITTED, least=0, most=1e6, optional=True),
    "mscale": number(OMITTED, least=0, most=100, optional=True),
    "mscale_all_dim": number(OMITTED, least=0, most=100, optional=True),
    "finetuned": Field(lambda name, value: value, OMITTED),  # says nothing about the rotation
}


def _rope_from(config: dict, head_dim: int, stored_schema: Mapping[str, Field]) -> tuple[Rope, int]:
    """The rotation, and the context that it is made for."""
    where = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    given = config[where] or {}
    if any(isinstance(entry, dict) for entry in given.values()):
        raise ValueError(f"{where}: expected one rotation for all layers, got one for each of {', '.join(given)}")
    stored = schema.read(stored_schema, given, f"{where}.", closed=True)
    kind = stored.get("rope_type") or stored.get("type") or "default"
    for key in ("rope_theta", "partial_rotary_factor"):
        if stored.get(key) is None and key in config:
            stored[key] = config[key]
    if "original_max_position_embeddings" in config:
        stored["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    for field in ROPE_NEEDED.get(kind, ()):
        theirs = ROPE_FIELDS[field]
        _expect(stored.get(theirs) is not None, f"{where}.{theirs}", f"a value, which {kind!r} needs", stored.get(theirs))

    dim = int(head_dim * (stored.get("partial_rotary_factor") or 1.0))
    odd = "partial_rotary_factor" if dim != head_dim else "head_dim"
    _expect(dim >= 2 and dim % 2 == 0, odd, "an even number of rotated dimensions, 2 or more", dim)
    context = config["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        original = stored.setdefault("original_max_position_embeddings", context)
        _expect(original is not None and original >= 2, "max_position_embeddings", f"an integer >= 2 for {kind!r}", original)
    if kind in ("yarn", "longrope"):
        if stored.get("factor") is None:
            stored["factor"] = context / stored["original_max_position_embeddings"]
        if stored.get("attention_factor") is None:
            stored["attention_factor"] = _attention_factor(stored, kind)
    rope = {"theta": stored.get("rope_theta") or 10000.0, "kind": kind}
    for field in ROPE_KINDS[kind]:
        value = stored.get(ROPE_FIELDS[field])
        if value is not None and not (field in ("fast", "slow") and value == 0):
            rope[field] = value
    if kind == "yarn":
        # max_position_embeddings is what it was before the rotation was stretched, or what it is after that.
        context = max(context, min(int(rope["factor"] * rope["original_context"]), MAX_POSITIONS))
    try:
        return Rope(dim=dim, **rope), context
    except ValueError as error:  # of fields that are right, each by itself
        field, _, reason = str(error).removeprefix("rope.").partition(":")
        raise ValueError(f"{where}.{ROPE_FIELDS[field]}:{reason}") from None


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
LLAMA = Family(LLAMA_SCHEMA, _llama_fields_from, _llama_config_to, LLAMA_NAMES)

WINDOW = _maybe(POSITIONS, 4096)
MISTRAL_SCHEMA = LLAMA_SCHEMA | {"sliding_window": WINDOW, "attention_bias": unsupported(), "mlp_bias": unsupported()}


def _mistral_fields_from(config):
    return _llama_fields_from(config, windows=_windows(config, config["sliding_window"]))


MISTRAL = Family(MISTRAL_SCHEMA, _mistral_fields_from, _llama_config_to, LLAMA_NAMES)

QWEN_SCHEMA = LLAMA_SCHEMA | {
    "sliding_window": WINDOW, "use_sliding_window": flag(False), "max_window_layers": integer(0, 2**16, 28),
    "mlp_bias": unsupported(),
}  # fmt: skip


def _qwen_windows(config: dict):
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"]
    return _windows(config, window, [window is not None and layer >= first for layer in range(config["num_hidden_layers"])])


def _qwen2_fields_from(config):
    return _llama_fields_from(config, qkv_bias=True, out_bias=False, windows=_qwen_windows(config))


def _qwen_config_to(config):
    windows = config.windows or (None,) * config.num_layers
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return _llama_config_to(config) | {"layer_types": types, "use_sliding_window": any(windows)}


QWEN2 = Family(QWEN_SCHEMA, _qwen2_fields_from, _qwen_config_to, LLAMA_NAMES)


def _qwen3_fields_from(config):
    return _llama_fields_from(config, qk_norm=True, windows=_qwen_windows(config))


QWEN3 = Family(
    QWEN_SCHEMA | {"head_dim": _maybe(integer(1, MAX_HEAD_DIM), 128), "use_qk_norm": only(True, True)},
    _qwen3_fields_from,
    _qwen_config_to,
    LLAMA_NAMES
    | {f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"},
)  # fmt: skip

PARTIAL_ROTATION = {"partial_rotary_factor": number(OMITTED, above=0, most=1)}
PHI3_SCHEMA = MISTRAL_SCHEMA | PARTIAL_ROTATION | {
    "sliding_window": _maybe(POSITIONS, None), "rms_norm_eps": number(1e-5, **EPSILON), "embd_pdrop": DROPOUT,
    "resid_pdrop": DROPOUT, "original_max_position_embeddings": integer(2, MAX_POSITIONS, 4096),
}  # fmt: skip


def _phi3_fields_from(config):
    dropout = config["resid_pdrop"]
    _expect(config["embd_pdrop"] == dropout, "embd_pdrop", f"{dropout!r}, as resid_pdrop", config["embd_pdrop"])
    for where in ("rope_scaling", "rope_parameters"):
        if config[where]:  # what early checkpoints call it
            longrope = {key: "longrope" for key in ("type", "rope_type") if config[where].get(key) in ("su", "yarn")}
            config = config | {where: config[where] | longrope}
    return _llama_fields_from(
        config, dropout=dropout, windows=_windows(config, config["sliding_window"]),
        rope_schema=STORED_ROPE_SCHEMA | PARTIAL_ROTATION,
    )  # fmt: skip


def _phi3_config_to(config):
    result = _llama_config_to(config) | {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout}
    parameters = result.get("rope_parameters", {})
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if key in parameters:
            result[key] = parameters[key]
    return result


PHI3 = Family(
    PHI3_SCHEMA,
    _phi3_fields_from,
    _phi3_config_to,
    LLAMA_NAMES
    | {"blocks.{i}.attention.qkv": "layers.{i}.self_attn.qkv_proj", "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_up_proj"},
)

GEMMA_SCHEMA = LLAMA_SCHEMA | {
    "hidden_act": choice(ACTIVATION_NAMES, "gelu_pytorch_tanh"), "head_dim": _maybe(integer(1, MAX_HEAD_DIM), 256),
    "tie_word_embeddings": flag(True), "mlp_bias": unsupported(),
}  # fmt: skip


def _gemma_fields_from(config, activation="hidden_act", **fields):
    if config[activation] == "gelu":  # which early checkpoints say, and do not mean
        config = config | {activation: "gelu_pytorch_tanh"}
    scale = math.sqrt(config["hidden_size"])
    return _llama_fields_from(config, activation=activation, norm_offset=1.0, embedding_scale=scale, **fields)


GEMMA = Family(GEMMA_SCHEMA, _gemma_fields_from, _llama_config_to, LLAMA_NAMES)

GEMMA2_SCHEMA = GEMMA_SCHEMA | {
    "hidden_activation": choice(ACTIVATION_NAMES, "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": number(256, least=1e-6, most=1e10),
    "attn_logit_softcapping": number(50.0, optional=True, **SCALE),
    "final_logit_softcapping": number(30.0, optional=True, **SCALE),
    "sliding_window": WINDOW,
}


def _gemma2_fields_from(config):
    layers = range(config["num_hidden_layers"])
    return _gemma_fields_from(
        config, "hidden_activation", post_norms=True,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=config["attn_logit_softcapping"],
        logit_softcap=config["final_logit_softcapping"],
        windows=_windows(config, config["sliding_window"], [layer % 2 == 0 for layer in layers]),
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
    GEMMA2_SCHEMA,
    _gemma2_fields_from,
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


def _own_fields_from(config: dict) -> dict:
    stored = config["fields"]
    rope = stored.get("rope")
    fields = schema.read(
        DECODER_SCHEMA, {name: value for name, value in stored.items() if name != "rope"}, "fields.", closed=True
    )
    if rope is None:
        return fields
    rope = mapping().check("fields.rope", rope)
    return fields | {"rope": Rope(**schema.read(ROPE_SCHEMA, rope, "fields.rope.", closed=True))}


def _own_config_to(config) -> dict:
    return {"fields": dataclasses.asdict(config)}


OWN = Family({"fields": mapping()} | TOKEN_IDS, _own_fields_from, _own_config_to, _OwnNames(), prefix="", ignored=r"$^")

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
    except ValueError:
        return False
