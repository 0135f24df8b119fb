"""Rotary embedding in config.json: transformers 5 has all of it in `rope_parameters`, earlier versions in `rope_scaling` and
beside it."""

import math
from collections.abc import Mapping
from typing import Any

from fastgpt import schema
from fastgpt.checkpoints.families.fields import expect, maybe
from fastgpt.model.rope import MAX_POSITIONS, ROPE_SCHEMA, Rope
from fastgpt.schema import OMITTED, Field, choice, integer, mapping, number, unsupported

ROPE_ENTRIES = {
    "rope_parameters": mapping(None, optional=True),
    "rope_scaling": mapping(None, optional=True),
    "rope_theta": ROPE_SCHEMA["theta"],
    "partial_rotary_factor": unsupported(1, 1.0),
    "original_max_position_embeddings": integer(2, MAX_POSITIONS, OMITTED),
}
ROPE_FIELDS = {  # ours -> transformers'
    "theta": "rope_theta", "kind": "rope_type", "factor": "factor", "original_context": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "truncate": "truncate", "short_factors": "short_factor", "long_factors": "long_factor",
    "attention_factor": "attention_factor",
}  # fmt: skip
ROPE_KINDS = {  # kind -> the fields that it has beyond theta and kind
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_context", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("factor", "original_context", "short_factors", "long_factors", "attention_factor"),
}
ROPE_NEEDED = {  # kind -> the fields for which there is no default
    "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_frequency_factor", "high_frequency_factor"),
    "longrope": ("short_factors", "long_factors"),
}  # fmt: skip
ROPE_TYPES = (*ROPE_KINDS, None)
STORED_ROPE_SCHEMA = {theirs: maybe(ROPE_SCHEMA[ours]) for ours, theirs in ROPE_FIELDS.items()} | {
    "rope_type": choice(ROPE_TYPES, OMITTED),
    "type": choice(ROPE_TYPES, OMITTED),
    "partial_rotary_factor": ROPE_ENTRIES["partial_rotary_factor"],
    "truncate": ROPE_SCHEMA["truncate"],
    "beta_fast": number(OMITTED, least=0, most=1e6, optional=True),  # 0, as none: the default
    "beta_slow": number(OMITTED, least=0, most=1e6, optional=True),
    "mscale": number(OMITTED, least=0, most=100, optional=True),
    "mscale_all_dim": number(OMITTED, least=0, most=100, optional=True),
    "finetuned": Field(lambda name, value: value, OMITTED),  # says nothing about the rotation
}

PARTIAL = STORED_ROPE_SCHEMA | {"partial_rotary_factor": number(OMITTED, above=0, most=1)}


def rope_from(config: dict, head_dim: int, stored_schema: Mapping[str, Field]) -> tuple[Rope, int]:
    """config.json -> the rotation, and the context length that it is made for.

    Args:
        stored_schema: of the entries of `rope_parameters`.

    Raises: ValueError that begins with the name of an entry.
    """
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
        expect(stored.get(theirs) is not None, f"{where}.{theirs}", f"a value, which {kind!r} needs", stored.get(theirs))

    dim = int(head_dim * (stored.get("partial_rotary_factor") or 1.0))
    odd = "partial_rotary_factor" if dim != head_dim else "head_dim"
    expect(dim >= 2 and dim % 2 == 0, odd, "an even number of rotated dimensions, 2 or more", dim)
    context = config["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        original = stored.setdefault("original_max_position_embeddings", context)
        expect(original is not None and original >= 2, "max_position_embeddings", f"an integer >= 2 for {kind!r}", original)
    if kind in ("yarn", "longrope"):
        if stored.get("factor") is None:
            stored["factor"] = context / stored["original_max_position_embeddings"]
        if stored.get("attention_factor") is None:
            stored["attention_factor"] = _attention_factor(stored, kind)
    rope: dict[str, Any] = {"theta": stored.get("rope_theta") or 10000.0, "kind": kind}
    for field in ROPE_KINDS[kind]:
        value = stored.get(ROPE_FIELDS[field])
        if value is not None and not (field in ("beta_fast", "beta_slow") and value == 0):
            rope[field] = value
    if kind == "yarn":
        # max_position_embeddings is what it was before the rotation was stretched, or what it is after that.
        context = max(context, min(int(rope["factor"] * rope["original_context"]), MAX_POSITIONS))
    try:
        return Rope(dim=dim, **rope), context
    except ValueError as error:  # of fields that are right, each by itself
        field, _, reason = str(error).removeprefix("rope.").partition(":")
        raise ValueError(f"{where}.{ROPE_FIELDS[field]}:{reason}") from None


def ropes_from(config: dict, head_dim: int, stored_schema: Mapping[str, Field], local_theta: str) -> tuple[Rope, Rope, int]:
    """config.json of a family whose layers with a window have a rotation of their own -> that of the others, that of these, and
    the context length. Earlier versions scale in `rope_scaling` that of the others only.

    Args:
        stored_schema: of the entries of each rotation.
        local_theta: the entry beside them with theta of layers with a window.

    Raises: ValueError that begins with the name of an entry.
    """
    given, kinds = config["rope_parameters"] or {}, ("full_attention", "sliding_attention")
    read = schema.read({kind: mapping(None, optional=True) for kind in kinds}, given, "rope_parameters.", closed=True)
    whole = config | {"rope_parameters": read["full_attention"]}
    local = config | {"rope_parameters": read["sliding_attention"], "rope_scaling": None, "rope_theta": config[local_theta]}
    rope, context = rope_from(whole, head_dim, stored_schema)
    return rope, rope_from(local, head_dim, stored_schema)[0], context


def ropes_to(config: Any) -> dict:
    """Both rotations as `rope_parameters`."""
    if config.rope is None:
        return {}
    both = {"full_attention": config.rope, "sliding_attention": config.local_rope or config.rope}
    return {"rope_parameters": {kind: rope_to(rope, config.head_dim) for kind, rope in both.items()}}


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


def rope_to(rope: Rope, head_dim: int) -> dict:
    """The rotation as `rope_parameters`."""
    fields = {field: getattr(rope, field) for field in ("theta", "kind", *ROPE_KINDS[rope.kind])}
    stored = {ROPE_FIELDS[name]: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return stored | ({"partial_rotary_factor": share_of(rope.dim, head_dim)} if rope.dim != head_dim else {})


def with_share(result: dict, config: Any) -> dict:
    """A config.json that also says which share is rotated where that is all, for families of which it is not the default."""
    if config.rope is None:
        return result
    share = {"partial_rotary_factor": share_of(config.rope.dim, config.head_dim)}
    return result | share | {"rope_parameters": result["rope_parameters"] | share}


def share_of(dim: int, head_dim: int) -> float:
    """The partial_rotary_factor of so many rotated dimensions, which are what its product with head_dim is rounded down to."""
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, 2)
