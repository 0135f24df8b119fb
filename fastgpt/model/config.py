"""The configuration of a decoder."""

from dataclasses import dataclass

from fastgpt import schema
from fastgpt.checkpoints.families.fields import DECODER_SCHEMA, MAX_HEAD_DIM
from fastgpt.model.rope import Rope


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
    intermediate_size: width of the MLP; default 4 · hidden_size.
    dropout: probability in training, for the embeddings and for the output of each attention and MLP.
    norm: "layer" or "rms".
    norm_eps: added to the variance, or to the mean square.
    norm_offset: added to the weight of a norm: 1 where a checkpoint stores weights minus one (Gemma).
    post_norms: also normalize the output of each attention and MLP, before it is added to the residual stream.
    activation: of the MLP, a name that `fastgpt.linear` takes: down(activation(up(x))).
    gated: the MLP is down(activation(gate(x)) · up(x)).
    qkv_bias, out_bias, mlp_bias: whether these projections have a bias.
    qk_norm: normalize queries and keys, per head.
    position: "learned" or "sinusoidal" embeddings, "rotary", or None.
    rope: the rotary embedding (`fastgpt.model.rope.Rope`), if position is "rotary".
    windows: for each layer the size of its attention window in tokens, the token itself included, or None for full attention;
        default: full attention in all layers.
    causal: False lets tokens attend to later ones as well, as in an encoder.
    cross_attention: each block also attends to a second sequence, such as the states of an encoder, between attention and MLP.
    attention_scale: factor on q·k; default 1 / sqrt(head_dim).
    attention_softcap: bound on the attention scores, c · tanh(scores / c); default: none.
    logit_softcap: bound on the logits, c · tanh(logits / c); default: none.
    embedding_scale: factor on the token embeddings, rounded to their dtype.
    tie_embeddings: the output matrix is the token embedding.

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
    intermediate_size: int | None = None
    norm: str = "layer"
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    position: str | None = "learned"
    rope: Rope | None = None
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
    cross_attention: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    tie_embeddings: bool = True

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
        if self.rope is not None and not isinstance(self.rope, Rope):
            raise TypeError(f"rope: expected a Rope or None, got {self.rope!r}")
        if (self.position == "rotary") != (self.rope is not None):
            raise ValueError(f"rope: expected a Rope if position is 'rotary', else None, got {self.rope!r}")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope.dim: expected at most head_dim={self.head_dim}, got {self.rope.dim}")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(f"windows: expected {self.num_layers} entries, one for each layer, got {self.windows!r}")
        if self.windows is not None and not self.causal:
            raise ValueError(f"windows: expected None for a model that is not causal, got {self.windows!r}")

    def window(self, layer: int) -> int | None:
        """The attention window of a layer, None for full attention."""
        return None if self.windows is None else self.windows[layer]
