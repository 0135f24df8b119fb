"""fastgpt's own format, for what transformers has no architecture for: a bigram model, any other mixture."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastgpt import schema
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import DECODER_SCHEMA, ENCODER_DECODER_SCHEMA, ENCODER_SCHEMA, TOKEN_IDS
from fastgpt.model.rope import ROPE_SCHEMA, Rope
from fastgpt.schema import Field, mapping


class _OwnNames(dict):
    def __contains__(self, module: object) -> bool:
        return True

    def __missing__(self, module: str) -> str:
        return module.replace(".mlp.experts.", ".mlp.experts.{e}.")


def _own_fields_from(entries: Mapping[str, Field], config: dict, prefix: str = "fields.") -> dict:
    stored = config["fields"]
    ropes = {name: stored[name] for name in ("rope", "local_rope") if stored.get(name) is not None}
    others = {name: value for name, value in stored.items() if name not in ("rope", "local_rope")}
    fields = schema.read(entries, others, prefix, closed=True)
    for name, rope in ropes.items():
        rope = mapping().check(f"{prefix}{name}", rope)
        fields[name] = Rope(**schema.read(ROPE_SCHEMA, rope, f"{prefix}{name}.", closed=True))
    return fields


def _own_stacks_from(config: dict) -> dict:
    entries = {"encoder": mapping(), "decoder": mapping()} | ENCODER_DECODER_SCHEMA
    fields = schema.read(entries, config["fields"], "fields.", closed=True)
    for stack, of_stack in (("encoder", DECODER_SCHEMA | ENCODER_SCHEMA), ("decoder", DECODER_SCHEMA)):
        fields[stack] = _own_fields_from(of_stack, {"fields": fields[stack]}, f"fields.{stack}.")
    return fields


def _own_config_to(config: Any) -> dict:
    return {"fields": dataclasses.asdict(config)}


def _own(entries: Mapping[str, Field], **options) -> Family:
    fields_from = options.pop("fields_from", partial(_own_fields_from, entries))
    return Family(
        {"fields": mapping()} | TOKEN_IDS, fields_from, _own_config_to, _OwnNames(), prefix="", ignored=r"$^", **options
    )  # fmt: skip


OWN = _own(DECODER_SCHEMA)
OWN_ENCODER = _own(DECODER_SCHEMA | ENCODER_SCHEMA, encoder=True)
OWN_ENCODER_DECODER = _own({}, fields_from=_own_stacks_from, stacks=("encoder", "decoder"))
