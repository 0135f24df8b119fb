"""One checkpoint family: how a folder that transformers writes maps to GPTConfig or EncoderConfig, and to a model's weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fastgpt import schema
from fastgpt.ops.quantized_weight import QuantizedWeight
from fastgpt.schema import Field

UNPREFIXED = ("output", "head", "transform", "score", "classifier")  # modules of ours: the output matrix and the heads
OF_EXPERTS = re.compile(r"(?:model\.)?blocks\.(\d+)\.mlp\.(up|down)(_bias)?")  # parameters of ours with those of all experts


class Fused(NamedTuple):
    """How a checkpoint's tensor with a first dimension of experts is that of each expert.

    parts: the names of an expert's tensors, `{e}` for the expert, whose rows are one below the other in it.
    transposed: the expert's matrices are stored (in, out).
    interleaved: rows of the parts alternate.
    """

    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """One checkpoint family, of decoders, of encoders, or of both together.

    schema: what its config.json may say.
    fields_from: config.json, checked by the schema and with its defaults -> GPTConfig's fields; raises ValueError that begins
        with the entry's name on what does not fit together.
    config_to: GPTConfig -> config.json.
    names: the decoder's module -> the checkpoint's, or several whose rows are one below the other in ours; `{i}` is the layer.
        Or a parameter of the decoder -> its whole name there.
        blocks.{i}.mlp.experts.up and .down are what the decoder holds of all experts in one tensor; `{e}` is the expert.
    fused: the checkpoint's names, with `{i}` and without prefix, of tensors that hold all experts -> what they are.
    writes_fused: whether those are what the family's checkpoints have; False: they are read, too.
    transposed: the checkpoint's modules, without the layer, whose matrices are stored (in, out).
    prefix: what the checkpoint's names may start with or not, depending on who saved it. The output matrix and the heads
        never do.
    ignored: a pattern of names that carry no weight.
    qkv_order: GPTConfig -> where the decoder's rows of queries, keys and values are in the checkpoint, (N,) int64: in our order,
        heads are one below the other, those of queries first, and rotary pairs are (n, n + dim/2). None: that order.
    row_orders: module of the decoder -> likewise of its rows, as a function of GPTConfig.
    encoder: whether it is one of encoders, `fastgpt.Encoder`, whose configuration is an EncoderConfig.
    stacks: of encoder-decoders, `fastgpt.EncoderDecoder`, what names of ours begin with, which are also entries of its fields:
        "encoder" and "decoder".
    gated: those of `names` that are others where the MLP is gated.
    renamed: patterns of names of earlier versions -> what to put there instead.
    further_layers: config.json -> the number of layers after the decoder's, which predict further tokens. They are not read.
    """

    schema: Mapping[str, Field]
    fields_from: Callable[[dict], dict]
    config_to: Callable[..., dict]
    names: Mapping[str, str | tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    prefix: str = "model."
    ignored: str = r"\.rotary_emb\.inv_freq$"
    qkv_order: Callable[[Any], torch.Tensor] | None = None
    row_orders: Mapping[str, Callable[[Any], torch.Tensor]] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    writes_fused: bool = False
    encoder: bool = False
    stacks: tuple[str, ...] = ()
    gated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    further_layers: Callable[[dict], int] = lambda config: 0

    @property
    def loader(self) -> str:
        """The class here that loads its checkpoints."""
        return "EncoderDecoder" if self.stacks else "Encoder" if self.encoder else "GPT"

    def parts(self, fields: dict) -> list[tuple[str, dict]]:
        """What is built of blocks: what its names begin with here, and its fields. Of a decoder or an encoder, that is all."""
        return [(f"{stack}.", fields[stack]) for stack in self.stacks] or [("", fields)]

    def for_mlp(self, is_gated: bool) -> "Family":
        """The family with the names that it has where the MLP is gated, or is not."""
        return replace(self, names={**self.names, **self.gated}) if is_gated and self.gated else self

    def config_from(self, config: dict) -> dict:
        """config.json -> the fields of GPTConfig or EncoderConfig. Raises ValueError that begins with the name of an entry that is
        missing, wrong or of a variant that cannot be served."""
        return self.fields_from(schema.read(self.schema, config))

    def checkpoint_names(self, parameter: str, experts: int | None = None) -> tuple[list[str], bool]:
        """The names in the checkpoint, with prefix, of a parameter of the decoder, or of a head that it is the `model` of; and
        whether they are transposed. Of a layer that was loaded in parts, the last number in its name is the part's.

        experts: their number, of a decoder that has some. Names of one after the other are returned.
        """
        of_experts = OF_EXPERTS.fullmatch(parameter)
        if of_experts is not None:
            layer, matrix, bias = of_experts.groups()
            stored_as = self.names[f"blocks.{{i}}.mlp.experts.{matrix}"]
            theirs = (stored_as,) if isinstance(stored_as, str) else stored_as
            kind = "bias" if bias else "weight"
            return [f"{self.prefix}{name.format(i=layer, e=e)}.{kind}" for e in range(experts or 0) for name in theirs], False
        whole = re.sub(r"\.\d+\.", ".{i}.", parameter.removeprefix("model."), count=1)
        if whole in self.names:
            layer = re.search(r"\.(\d+)\.", parameter)
            return [self.prefix + str(self.names[whole]).format(i=layer[1] if layer else "")], False
        module, _, kind = parameter.removeprefix("model.").rpartition(".")
        module, part = re.fullmatch(r"(.*?)(?:\.(\d+))?", module).groups()  # type: ignore[union-attr]  # matches anything
        layer = re.search(r"\.(\d+)\.", module)
        stored_as = self.names[re.sub(r"\.\d+\.", ".{i}.", module, count=1)]
        theirs = (stored_as,) if isinstance(stored_as, str) else stored_as
        theirs = theirs if part is None else theirs[int(part) :][:1]
        prefix = "" if module.partition(".")[0] in UNPREFIXED else self.prefix
        names = [f"{prefix}{name.format(i=layer[1] if layer else '')}.{kind}" for name in theirs]
        return names, kind == "weight" and theirs[0] in self.transposed

    def weights_of(self, *modules: str) -> set[str]:
        """The names in the checkpoint, with prefix, of weights and biases of modules, as far as the family has these."""
        names = (f"{module}.{kind}" for module in modules if module in self.names for kind in ("weight", "bias"))
        return {theirs for name in names for theirs in self.checkpoint_names(name)[0]}

    def row_order(self, parameter: str, config: Any) -> torch.Tensor | None:
        """Where the rows of a parameter of the decoder are among those of `checkpoint_names`, (N,) int64; None: in their places."""
        module = re.sub(r"\.\d+\.", ".{i}.", parameter.removeprefix("model."), count=1).rpartition(".")[0]
        if module in self.row_orders:
            return self.row_orders[module](config)
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
        for pattern, new in self.renamed.items():
            name = re.sub(pattern, new, name)
        bare = {f"{theirs}." for module, theirs in self.names.items() if module.partition(".")[0] in UNPREFIXED}
        return name if name.startswith((self.prefix, *bare)) else self.prefix + name

    def fused_as(self, name: str) -> tuple[Fused, str] | None:
        """What a stored tensor of all experts is, and the number of its layer; None for any other. name: with prefix."""
        if not self.fused:
            return None
        bare = name.removeprefix(self.prefix)
        layer = re.search(r"\.(\d{1,9})\.", bare)
        fused = self.fused.get(re.sub(r"\.\d+\.", ".{i}.", bare, count=1))
        return None if fused is None or layer is None else (fused, layer[1])

    def layer_pattern(self, part: str) -> str:
        """Of stored names of a layer's weights, with or without prefix; its group is the number of the layer. part: of `parts`."""
        first = str(self.names[f"{part}blocks.{{i}}.attention.out"]).partition("{i}")[0]
        return f"^(?:{re.escape(self.prefix)})?{re.escape(first)}(\\d{{1,9}})\\."


def as_rows(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of the decoder with the rows of all experts one below the other, as those of a checkpoint's parts are."""
    rows_first = OF_EXPERTS.fullmatch(name) is None or isinstance(parameter, QuantizedWeight)
    return parameter if rows_first else parameter.flatten(0, 1)


def adjacent_pairs(config: Any) -> torch.Tensor:
    """`qkv_order` of a checkpoint in which rotary pairs of queries and keys are (2n, 2n + 1)."""
    rotated, dim = config.rope.dim, config.head_dim
    pairs = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim)])
    queries_and_keys = torch.arange(0, (config.num_heads + config.num_kv_heads) * dim, dim)[:, None] + pairs
    values = queries_and_keys.numel() + torch.arange(config.num_kv_heads * dim)
    return torch.cat([queries_and_keys.flatten(), values])
