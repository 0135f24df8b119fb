"""One checkpoint family: how a folder that transformers writes maps to GPTConfig and to the decoder's weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt import schema
from fastgpt.schema import Field

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
    qkv_order: GPTConfig -> where the decoder's rows of queries, keys and values are in the checkpoint, (N,) int64: in our order,
        heads are one below the other, those of queries first, and rotary pairs are (n, n + dim/2). None: that order.
    """

    schema: Mapping[str, Field]
    fields_from: Callable[[dict], dict]
    config_to: Callable[..., dict]
    names: Mapping[str, str | tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    prefix: str = "model."
    ignored: str = r"\.rotary_emb\.inv_freq$"
    qkv_order: Callable[[Any], torch.Tensor] | None = None

    def config_from(self, config: dict) -> dict:
        """config.json -> GPTConfig's fields. Raises ValueError that begins with the name of an entry that is missing, wrong or
        of a variant that cannot be served."""
        return self.fields_from(schema.read(self.schema, config))

    def checkpoint_names(self, parameter: str) -> tuple[list[str], bool]:
        """The names in the checkpoint, with prefix, of a parameter of the decoder, or of a head that it is the `model` of; and
        whether they are transposed. Of a layer that was loaded in parts, the last number in its name is the part's."""
        module, _, kind = parameter.removeprefix("model.").rpartition(".")
        module, part = re.fullmatch(r"(.*?)(?:\.(\d+))?", module).groups()  # type: ignore[union-attr]  # matches anything
        layer = re.search(r"\.(\d+)\.", module)
        stored_as = self.names[re.sub(r"\.\d+\.", ".{i}.", module, count=1)]
        theirs = (stored_as,) if isinstance(stored_as, str) else stored_as
        theirs = theirs if part is None else theirs[int(part) :][:1]
        prefix = "" if module in UNPREFIXED else self.prefix
        names = [f"{prefix}{name.format(i=layer[1] if layer else '')}.{kind}" for name in theirs]
        return names, kind == "weight" and theirs[0] in self.transposed

    def row_order(self, parameter: str, config: Any) -> torch.Tensor | None:
        """Where the rows of a parameter of the decoder are among those of `checkpoint_names`, (N,) int64; None: in their places."""
        qkv = re.search(r"\.attention\.qkv(?:\.(\d))?(?:\.|$)", parameter)
        if qkv is None or self.qkv_order is None:
            return None
        order = self.qkv_order(config)
        if qkv[1] is None:
            return order
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        first = sum(sizes[: int(qkv[1])])  # of a layer that was loaded in parts, whose rows stay within them
        return order[first : first + sizes[int(qkv[1])]] - first

    def with_prefix(self, name: str) -> str | None:
        """A stored name as it is with the prefix, or None if it carries no weight."""
        if re.search(self.ignored, name):
            return None
        bare = {f"{self.names[module]}." for module in UNPREFIXED if module in self.names}
        return name if name.startswith((self.prefix, *bare)) else self.prefix + name

    @property
    def layer_pattern(self) -> str:
        """Of stored names of a layer's weights, with or without prefix; its group is the number of the layer."""
        first = str(self.names["blocks.{i}.attention.out"]).partition("{i}")[0]
        return f"^(?:{re.escape(self.prefix)})?{re.escape(first)}(\\d{{1,9}})\\."


def adjacent_pairs(config: Any) -> torch.Tensor:
    """`qkv_order` of a checkpoint in which rotary pairs of queries and keys are (2n, 2n + 1)."""
    rotated, dim = config.rope.dim, config.head_dim
    pairs = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim)])
    queries_and_keys = torch.arange(0, (config.num_heads + config.num_kv_heads) * dim, dim)[:, None] + pairs
    values = queries_and_keys.numel() + torch.arange(config.num_kv_heads * dim)
    return torch.cat([queries_and_keys.flatten(), values])
