"""fastgpt's own format, for what transformers has no architecture for: an encoder, a bigram model, any other mixture."""

import dataclasses
from typing import Any

from fastgpt import schema
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import DECODER_SCHEMA, TOKEN_IDS
from fastgpt.model.rope import ROPE_SCHEMA, Rope
from fastgpt.schema import mapping


class _OwnNames(dict):
    def __missing__(self, module: str) -> str:
        return module.replace(".mlp.experts.", ".mlp.experts.{e}.")


def _own_fields_from(config: dict) -> dict:
    stored = config["fields"]
    ropes = {name: stored[name] for name in ("rope", "local_rope") if stored.get(name) is not None}
    others = {name: value for name, value in stored.items() if name not in ("rope", "local_rope")}
    fields = schema.read(DECODER_SCHEMA, others, "fields.", closed=True)
    for name, rope in ropes.items():
        rope = mapping().check(f"fields.{name}", rope)
        fields[name] = Rope(**schema.read(ROPE_SCHEMA, rope, f"fields.{name}.", closed=True))
    return fields


def _own_config_to(config: Any) -> dict:
    return {"fields": dataclasses.asdict(config)}


OWN = Family({"fields": mapping()} | TOKEN_IDS, _own_fields_from, _own_config_to, _OwnNames(), prefix="", ignored=r"$^")
