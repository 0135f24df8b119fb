"""What a decoder is made of."""

from dataclasses import dataclass

from fastgpt import schema
from fastgpt.checkpoints.families.fields import DECODER_SCHEMA, MAX_HEAD_DIM
from fastgpt.model.rope import Rope


@dataclass(frozen=True)
class GPTConfig:
    """What a decoder is made of. The defaults are GPT-2's.

    num_heads, num_kv_heads, head_dim: of attention; default as many key and value heads as query heads, and
        hidden_size / num_heads. Each key head serves num_heads / num_kv_heads query heads.
    intermediate_size: width of the MLP; default 4 · hidden_size.
    dropout: in training, of the embeddings and of what each attention and MLP adds to the residual stream.
    norm: "layer" or "rms", with norm_eps; norm_offset is added to its weight.
    post_norms: what attention and MLP add to the residual stream is normalized, too.
    activation: of the MLP: down(activation(up(x))), or if gated down(activation(gate(x)) · up(x)).
    qkv_bias, out_bias, mlp_bias: whether the matrices have one.
    qk_norm: queries and keys are normalized, head by head.
    position: "learned" or "sinusoidal" embeddings, "rotary" as `rope` says, or None.
    windows: for each layer the last tokens that one attends to, itself included, or None for all; default all, everywhere.
    causal: False lets tokens attend to later ones as well: an encoder.
    cross_attention: between attention and MLP, each block attends to a second stream, too: the states of an encoder, say.
    attention_scale, attention_softcap: of `attention`; default 1 / sqrt(head_dim), and none.
    logit_softcap: bound on the logits, c · tanh(logits / c).
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
            raise ValueError(f"rope: expected a Rope if position is 'rotary', and None else, got {self.rope!r}")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope.dim: expected at most head_dim={self.head_dim}, got {self.rope.dim}")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(f"windows: expected {self.num_layers}, one for each layer, got {self.windows!r}")
        if self.windows is not None and not self.causal:
            raise ValueError(f"windows: expected None for a model that is not causal, got {self.windows!r}")

    def window(self, layer: int) -> int | None:
        return None if self.windows is None else self.windows[layer]
