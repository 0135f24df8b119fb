"""Checkpoint families: how a folder that transformers writes maps to GPTConfig and to the decoder's weights.

A family is one `Family` entry in FAMILIES. Nothing else in the package knows a family's names.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One checkpoint family.

    config_from: transformers' config.json -> GPTConfig's fields; raises ValueError on a variant that it cannot serve.
    config_to: GPTConfig's fields -> config.json.
    names: the decoder's parameter name -> the checkpoint's; `{i}` is the layer.
    transposed: the checkpoint's names, without the layer, whose matrices are stored (in, out).
    prefix: what the checkpoint's names may start with or not, depending on who saved it.
    ignored: a pattern of names that carry no weight.
    """

    config_from: Callable[[dict], dict]
    config_to: Callable[[dict], dict]
    names: dict[str, str]
    transposed: frozenset[str]
    prefix: str
    ignored: str

    def checkpoint_name(self, parameter: str) -> tuple[str, bool]:
        """The name in the checkpoint, with prefix, of one of the decoder's parameters; and whether it is transposed."""
        layer = re.search(r"\.(\d+)\.", parameter)
        pattern = re.sub(r"\.\d+\.", ".{i}.", parameter, count=1)
        name = self.names[pattern]
        return self.prefix + name.format(i=layer[1] if layer else ""), name in self.transposed

    def stored_names(self, names: Iterable[str]) -> dict[str, str]:
        """Name with prefix -> name as stored, for every stored name that carries a weight."""
        return {
            name if name.startswith(self.prefix) else self.prefix + name: name
            for name in names
            if not re.search(self.ignored, name)
        }


def _gpt2_config_from(config: dict) -> dict:
    expected = {
        "activation_function": "gelu_new",
        "n_inner": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if config.get(key, value) != value and not (key == "n_inner" and config[key] == 4 * config["n_embd"]):
            raise ValueError(f"config.json: expected {key} to be {value!r} in a gpt2 checkpoint, got {config[key]!r}")
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_size": config["n_embd"],
        "dropout": config.get("resid_pdrop", 0.1),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _gpt2_config_to(fields: dict) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": fields["vocab_size"],
        "n_positions": fields["context_length"],
        "n_layer": fields["num_layers"],
        "n_head": fields["num_heads"],
        "n_embd": fields["hidden_size"],
        "embd_pdrop": fields["dropout"],
        "resid_pdrop": fields["dropout"],
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": fields["norm_eps"],
        # transformers' defaults name tokens of OpenAI's vocabulary, which a smaller one does not have.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _weight_and_bias(modules: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}


GPT2 = Family(
    config_from=_gpt2_config_from,
    config_to=_gpt2_config_to,
    names={
        "token_embedding.weight": "wte.weight",
        "position_embedding.weight": "wpe.weight",
        **_weight_and_bias(
            {
                "blocks.{i}.attention_norm": "h.{i}.ln_1",
                "blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
                "blocks.{i}.attention.out": "h.{i}.attn.c_proj",
                "blocks.{i}.mlp_norm": "h.{i}.ln_2",
                "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
                "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
                "norm": "ln_f",
            }
        ),
    },
    transposed=frozenset(
        f"h.{{i}}.{matrix}.weight" for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    prefix="transformer.",
    # Causal masks that old checkpoints carry as buffers, and the output matrix, which is the token embedding.
    ignored=r"\.attn\.(bias|masked_bias)$|^lm_head\.weight$",
)

FAMILIES = {"gpt2": GPT2}
