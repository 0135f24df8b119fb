"""The configurations of a decoder and of an encoder."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastgpt import schema
from fastgpt.checkpoints.families.fields import DECODER_SCHEMA, ENCODER_DECODER_SCHEMA, ENCODER_SCHEMA, MAX_HEAD_DIM
from fastgpt.checks import shown
from fastgpt.model.rope import Rope
from fastgpt.ops.linear import ACTIVATIONS

ROUTING = (  # fields that only a mixture of experts has
    "shared_expert_gate", "router_bias", "router_fp32", "router_scoring", "router_groups", "router_top_groups",
    "router_group_score", "router_normalize", "router_scale", "router_selection_bias",
)  # fmt: skip


@dataclass(frozen=True)
class GPTConfig:
    """The architecture and sizes of a decoder. The defaults are GPT-2's.

    vocab_size: number of token ids.
    context_length: the maximum number of tokens in a sequence, prompt included.
    num_layers: number of blocks.
    hidden_size: width of the residual stream.
    num_heads: query heads of attention.
    num_kv_heads: key and value heads; default num_heads. Each of them is shared by num_heads / num_kv_heads query heads.
    head_dim: size of a head; default hidden_size / num_heads.
    v_head_dim: size of a head of values; default head_dim. Another one needs kv_rank.
    kv_rank: in multi-head latent attention the size of the latent vector, normalized, from which the keys and values of all heads
        are projected; except for the first rope.dim dimensions of keys, which all heads share. Default: there is none.
    q_rank: with kv_rank, the size of a latent vector from which queries are projected; default: there is none.
    latent_norm_eps: norm_eps of the norms of these vectors; default norm_eps.
    intermediate_size: width of the MLP; default 4 · hidden_size.
    dropout: probability in training, for the embeddings and for the output of each attention and MLP.
    norm: "layer" or "rms".
    norm_eps: added to the variance, or to the mean square.
    norm_offset: added to the weight of a norm: 1 where a checkpoint stores weights minus one (Gemma).
    norm_bias: whether layer norms have a bias.
    pre_norms: norms of a block's input: 2, one before attention and one before the MLP; 1 for both of a parallel block; or 0.
    post_norms: also normalize the output of each attention and MLP, before it is added to the residual stream.
    norm_first: normalize the input of each attention and MLP, as pre_norms says, and the output of the last block. False:
        normalize the residual stream after each addition (Vaswani et al., arXiv 1706.03762).
    parallel: attention and MLP of a block both read its input, x + attention(norm(x)) + mlp(norm(x)), not one after the other.
    residual_scale: factor on the output of each attention and MLP, before it is added to the residual stream. What the decoder
        computes, and returns as hidden states, is that stream divided by it, of which norms are the same.
    activation: of the MLP, a name that `fastgpt.linear` takes: down(activation(up(x))); or of experts alone, one that
        `fastgpt.moe` takes.
    gated: the MLP is down(activation(gate(x)) · up(x)).
    qkv_bias, out_bias, mlp_bias: whether these projections have a bias.
    num_experts: experts of a layer with a mixture of experts in place of the MLP; default: no layer has one. They are MLPs with
        the same activation, gate and biases. A linear layer, the router, gives the logits of `fastgpt.route`.
    experts_per_token: how many of them a token is routed to.
    expert_size: width of an expert; default intermediate_size.
    shared_expert_size: width of one more MLP beside the experts, for all tokens; default: there is none.
    shared_expert_gate: multiply its output with sigmoid(gate(x)), of a linear layer with one output.
    moe_layers: for each layer whether it has a mixture of experts; default: all have, if num_experts is given.
    router_bias: whether the router has a bias.
    router_fp32: the router has its weights in fp32, and computes in it, if the others are in fp16 or bf16.
    router_scoring, router_groups, router_top_groups, router_group_score, router_normalize, router_scale: scoring, num_groups,
        top_groups, group_score, normalize and scale of `fastgpt.route`.
    router_selection_bias: whether a number is added to each expert's score for choosing only: selection_bias of `fastgpt.route`.
    qk_norm: normalize queries and keys.
    qk_norm_per_head: each head by itself; False: all heads of a token together.
    position: "learned" or "sinusoidal" embeddings, "rotary", "relative" (T5's bias on the scores of attention, the same in all
        layers) or None.
    relative_buckets: number of buckets of distances, with position "relative"; if not causal, each direction has half of them.
    relative_max_distance: from where on distances are in one bucket, in tokens.
    rope: the rotary embedding (`fastgpt.model.rope.Rope`), if position is "rotary".
    local_rope: that of layers with a window, if it is another one.
    rope_layers: for each layer whether it has a rotary embedding; default: all have.
    windows: for each layer the size of its attention window in tokens, the token itself included, or None for full attention;
        default: full attention in all layers. If not causal, it is on both sides: window tokens up to the token itself, and as
        many from there on.
    causal: False lets tokens attend to later ones as well, as in an encoder.
    cross_attention: each block also attends to a second sequence, such as the states of an encoder, between attention and MLP.
    attention_scale: factor on q·k; default 1 / sqrt(head_dim).
    attention_softcap: bound on the attention scores, c · tanh(scores / c); default: none.
    attention_sinks: each head has one more logit in the softmax, of no key, as `sinks` of `fastgpt.attention`.
    logit_scale: factor on the logits.
    logit_softcap: bound on the logits, c · tanh(logits / c); default: none.
    embedding_scale: factor on the token embeddings, rounded to their dtype.
    tie_embeddings: the output matrix is the token embedding.
    output_bias: whether the output matrix has a bias; if it is not tied.

    Raises: TypeError, ValueError that begins with the field's name.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    hidden_size: int
    dropout: float = 0.0
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    kv_rank: int | None = None
    q_rank: int | None = None
    latent_norm_eps: float | None = None
    intermediate_size: int | None = None
    norm: str = "layer"
    norm_offset: float = 0.0
    norm_bias: bool = True
    pre_norms: int = 2
    post_norms: bool = False
    norm_first: bool = True
    parallel: bool = False
    residual_scale: float = 1.0
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_size: int | None = None
    shared_expert_size: int | None = None
    shared_expert_gate: bool = False
    moe_layers: tuple[bool, ...] | None = None
    router_bias: bool = False
    router_fp32: bool = False
    router_scoring: str = "softmax"
    router_groups: int = 1
    router_top_groups: int = 1
    router_group_score: str = "max"
    router_normalize: bool = False
    router_scale: float = 1.0
    router_selection_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    position: str | None = "learned"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rope: Rope | None = None
    local_rope: Rope | None = None
    rope_layers: tuple[bool, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
    cross_attention: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    tie_embeddings: bool = True
    output_bias: bool = False

    def __post_init__(self):
        schema.check_fields(self, DECODER_SCHEMA)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={self.num_heads}, got {self.hidden_size}")
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "intermediate_size": 4 * self.hidden_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.num_layers and self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {MAX_HEAD_DIM}, got {self.head_dim}")
        for name, rope in (("rope", self.rope), ("local_rope", self.local_rope)):
            if rope is not None and not isinstance(rope, Rope):
                raise TypeError(f"{name}: expected a Rope or None, got {shown(rope)}")
            if rope is not None and rope.dim > self.head_dim:
                raise ValueError(f"{name}.dim: expected at most head_dim={self.head_dim}, got {rope.dim}")
        if (self.position == "rotary") != (self.rope is not None):
            raise ValueError(f"rope: expected a Rope if position is 'rotary', else None, got {shown(self.rope)}")
        if self.local_rope is not None and (self.rope is None or self.local_rope.kind == "longrope"):
            raise ValueError(
                f"local_rope: expected None without rope, and another kind than longrope, got {shown(self.local_rope)}"
            )
        if self.rope_layers is not None and self.rope is None:
            raise ValueError(f"rope_layers: expected None without rope, got {shown(self.rope_layers)}")
        self._check_latents()
        self._check_experts()
        for name, of_layers in (("windows", self.windows), ("rope_layers", self.rope_layers), ("moe_layers", self.moe_layers)):
            if of_layers is not None and len(of_layers) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} entries, one for each layer, got {shown(of_layers)}")
        if self.pre_norms == 1 and not self.parallel:
            raise ValueError("pre_norms: expected 2 or 0 for blocks that are not parallel, got 1")
        if self.parallel and self.cross_attention:
            raise ValueError("parallel: expected False with cross_attention, got True")
        if not (self.norm_first or self.is_encoder):  # which has only the defaults of these
            for name in ("pre_norms", "post_norms", "parallel", "residual_scale"):
                if getattr(self, name) != getattr(GPTConfig, name):
                    expected = repr(getattr(GPTConfig, name))
                    raise ValueError(f"{name}: expected {expected} with norm_first=False, got {shown(getattr(self, name))}")
        if self.position == "relative":
            exact = self.relative_buckets // (2 if self.causal else 4)
            if exact < 1 or self.relative_max_distance <= exact:
                raise ValueError(
                    f"relative_max_distance: expected at least two buckets in each direction, and more than the {exact} distances "
                    f"that have one each, got {self.relative_max_distance} and relative_buckets={self.relative_buckets}"
                )
        if self.output_bias and self.tie_embeddings:
            raise ValueError("output_bias: expected False with tie_embeddings, got True")

    def _check_latents(self) -> None:
        if self.kv_rank is None:
            for name in ("q_rank", "latent_norm_eps"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected None without kv_rank, got {shown(getattr(self, name))}")
            if self.v_head_dim not in (None, self.head_dim):
                raise ValueError(f"v_head_dim: expected head_dim={self.head_dim} without kv_rank, got {self.v_head_dim}")
        else:
            if self.rope is None or self.rope.dim >= self.head_dim:
                raise ValueError(f"rope.dim: expected less than head_dim={self.head_dim} with kv_rank, got {shown(self.rope)}")
            if self.num_kv_heads != self.num_heads:
                raise ValueError(f"num_kv_heads: expected num_heads={self.num_heads} with kv_rank, got {self.num_kv_heads}")
            if self.qk_norm:
                raise ValueError("qk_norm: expected False with kv_rank, got True")
            if self.latent_norm_eps is None:
                object.__setattr__(self, "latent_norm_eps", self.norm_eps)
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        if self.num_layers and self.v_head_dim > MAX_HEAD_DIM:
            raise ValueError(f"v_head_dim: expected at most {MAX_HEAD_DIM}, got {self.v_head_dim}")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            for name in ("experts_per_token", "expert_size", "shared_expert_size", "moe_layers"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected None without num_experts, got {shown(getattr(self, name))}")
            for name in ROUTING:
                if getattr(self, name) != getattr(GPTConfig, name):
                    raise ValueError(
                        f"{name}: expected {getattr(GPTConfig, name)!r} without num_experts, got {shown(getattr(self, name))}"
                    )
        else:
            if self.experts_per_token is None or self.experts_per_token > self.num_experts:
                raise ValueError(
                    f"experts_per_token: expected an integer from 1 to num_experts={self.num_experts}, got {self.experts_per_token}"
                )
            if self.num_experts % self.router_groups:
                raise ValueError(
                    f"router_groups: expected a divisor of num_experts={self.num_experts}, got {self.router_groups}"
                )
            size = self.num_experts // self.router_groups
            if self.router_top_groups > self.router_groups or self.router_top_groups * size < self.experts_per_token:
                raise ValueError(
                    f"router_top_groups: expected as many of router_groups={self.router_groups} groups of {size} experts as "
                    f"experts_per_token={self.experts_per_token} needs, got {self.router_top_groups}"
                )
            if self.router_group_score == "top2" and self.router_top_groups < self.router_groups and size < 2:
                raise ValueError(f"router_groups: expected groups of 2 experts or more for 'top2', got {self.router_groups}")
            if self.expert_size is None:
                object.__setattr__(self, "expert_size", self.intermediate_size)
            if self.shared_expert_gate and self.shared_expert_size is None:
                raise ValueError("shared_expert_gate: expected False without shared_expert_size, got True")
        if self.activation not in ACTIVATIONS:
            only_experts = self.num_experts is not None and self.shared_expert_size is None
            if not (only_experts and self.gated and all(self.moe_layers or (True,))):
                raise ValueError(
                    f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))} for an MLP, or where experts are not gated, "
                    f"got {shown(self.activation)}"
                )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of the MLP."""
        return self.num_experts is not None and (self.moe_layers is None or self.moe_layers[layer])

    @property
    def is_encoder(self) -> bool:
        """Whether it is an `EncoderConfig`."""
        return isinstance(self, EncoderConfig)

    def window(self, layer: int) -> int | None:
        """The attention window of a layer, None for full attention."""
        return None if self.windows is None else self.windows[layer]

    def rotation(self, positions: int, long: bool = False) -> tuple[torch.Tensor, ...]:
        """cos and sin of the rotary embedding (`Rope.rotation`), followed by those of local_rope, if there is one."""
        tables = self.rope.rotation(positions, long)  # type: ignore[union-attr]  # asked for where there is one
        return tables if self.local_rope is None else tables + self.local_rope.rotation(positions)

    def rotation_of(self, layer: int) -> slice | None:
        """Which of the tensors of `rotation` are a layer's."""
        if self.rope is None or self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        return slice(2, 4) if self.local_rope is not None and self.window(layer) is not None else slice(0, 2)


@dataclass(frozen=True)
class EncoderConfig(GPTConfig):
    """The architecture and sizes of an `Encoder`. The defaults are BERT's. The fields of `GPTConfig` have the same meaning, unless
    they are described here; those in `NOT_OF_ENCODERS` keep their defaults.

    first_position: the position of a sequence's first token in the table of position embeddings, which has as many rows more.
    token_types: number of kinds of tokens, such as those of a first and of a second sentence, that have an embedding; default:
        tokens have no types.
    embedding_norm: normalize the embeddings.
    norm_first: as of decoders, except that the input of the first attention is not normalized again with embedding_norm.
    pooler: whether it has a layer for the states of the first tokens: pooler_activation(dense(state)).
    pooler_activation: "tanh" or "relu", of the pooler, and of the layer before the classes of sequences. None: before the
        classes of sequences, and before those of tokens, is a layer like the masked head's.
    pooling: what sequences are classified by: "first", the state of the first token, or "mean", that of all tokens.
    masked_head: whether it has a masked-language head: output matrix · norm(head_activation(dense(state))) + bias.
    head_activation: a name that `fastgpt.linear` takes.
    head_bias: whether its dense layer has a bias.
    vocabulary_bias: whether its logits have a bias.

    Raises: TypeError, ValueError that begins with the field's name.
    """

    NOT_OF_ENCODERS: ClassVar[tuple[str, ...]] = (
        "pre_norms", "post_norms", "parallel", "residual_scale", "cross_attention", "logit_scale", "logit_softcap", "output_bias",
        "num_experts", "attention_sinks", "kv_rank",
    )  # fmt: skip

    activation: str = "gelu"
    norm_eps: float = 1e-12
    causal: bool = False
    first_position: int = 0
    token_types: int = 0
    embedding_norm: bool = True
    norm_first: bool = False
    pooler: bool = False
    pooler_activation: str | None = "tanh"
    pooling: str = "first"
    masked_head: bool = False
    head_activation: str = "gelu"
    head_bias: bool = True
    vocabulary_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        schema.check_fields(self, ENCODER_SCHEMA)
        for name in self.NOT_OF_ENCODERS:
            if getattr(self, name) != getattr(GPTConfig, name):
                raise ValueError(
                    f"{name}: expected {getattr(GPTConfig, name)!r} for an encoder, got {shown(getattr(self, name))}"
                )
        if self.causal:
            raise ValueError("causal: expected False for an encoder, got True")
        if self.first_position and self.position != "learned":
            raise ValueError(f"first_position: expected 0 without learned positions, got {self.first_position}")


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The architecture and sizes of an `EncoderDecoder`.

    encoder: of the encoder.
    decoder: of the decoder, which has cross-attention, and the encoder's hidden_size.
    start_token: the token that every output begins with.
    share_embedding: encoder and decoder have one token embedding, and then one vocabulary.

    Raises: TypeError, ValueError that begins with the field's name.
    """

    encoder: EncoderConfig
    decoder: GPTConfig
    start_token: int = 0
    share_embedding: bool = True

    def __post_init__(self):
        for name, expected in (("encoder", EncoderConfig), ("decoder", GPTConfig)):
            if type(getattr(self, name)) is not expected:
                raise TypeError(f"{name}: expected {expected.__name__}, got {shown(getattr(self, name))}")
        schema.check_fields(self, ENCODER_DECODER_SCHEMA)
        encoder, decoder = self.encoder, self.decoder
        for name, got, expected in (
            ("cross_attention", decoder.cross_attention, True), ("causal", decoder.causal, True),
            ("num_experts", decoder.num_experts, None), ("hidden_size", decoder.hidden_size, encoder.hidden_size),
            *([("vocab_size", decoder.vocab_size, encoder.vocab_size)] if self.share_embedding else []),
        ):  # fmt: skip
            if got != expected:
                raise ValueError(f"decoder.{name}: expected {expected!r} beside this encoder, got {shown(got)}")
        for name in ("pooler", "masked_head", "token_types"):
            if getattr(encoder, name):
                raise ValueError(f"encoder.{name}: expected none beside a decoder, got {shown(getattr(encoder, name))}")
        if self.start_token >= decoder.vocab_size:
            raise ValueError(f"start_token: expected a token from 0 to {decoder.vocab_size - 1}, got {self.start_token}")

    is_encoder: ClassVar[bool] = False
    num_experts: ClassVar[None] = None
    router_fp32: ClassVar[bool] = False
    cross_attention: ClassVar[bool] = True

    @property
    def vocab_size(self) -> int:
        """Of the decoder."""
        return self.decoder.vocab_size

    @property
    def context_length(self) -> int:
        """Of the encoder: the maximum number of tokens in an input."""
        return self.encoder.context_length


def require_config(config: object, expected: type) -> None:
    """Raises TypeError for a model's config that is none of its class."""
    if not isinstance(config, expected):
        raise TypeError(f"config: expected a fastgpt.{expected.__name__}, got {shown(config)}")
