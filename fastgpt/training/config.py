"""The settings of a training run, and the model that they define."""

from dataclasses import dataclass, field
from typing import Any

import torch

from fastgpt.checks import require_choice, require_integer, require_number, shown
from fastgpt.model.config import GPTConfig
from fastgpt.model.lora import TARGETS
from fastgpt.ops.quantized_weight import BITS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("stored", *BITS)
# Settings that cannot change when a run is resumed: they define the model, or the windows that held-out losses are compared on.
FIXED_ON_RESUME = (
    "layers", "heads", "width", "context", "dropout", "lora", "lora_alpha", "lora_targets", "weights", "eval_windows",
)  # fmt: skip
SETTINGS = {
    "context_length": "context",
    "num_layers": "layers",
    "num_heads": "heads",
    "hidden_size": "width",
}  # field of GPTConfig -> setting


def setting(default: Any, meaning: str) -> Any:
    """A field of TrainConfig with its help text in `fastgpt train --help`."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, each with its help text in `fastgpt train --help`. Lengths are in tokens.

    dtype: of matrix products and attention: "float32", or "bfloat16" by autocast. Weights and their updates are float32.

    Raises: TypeError or ValueError that begins with the name of the setting.
    """

    layers: int = setting(6, "transformer blocks; 0 makes a bigram model, the baseline to beat")
    heads: int = setting(6, "attention heads; the width is a multiple of them")
    width: int = setting(192, "hidden size: features of each token")
    context: int = setting(256, "context length, which is also that of each training window, in tokens")
    dropout: float = setting(0.1, "dropout probability in training")
    batch_size: int = setting(16, "windows per optimizer step, in all processes together")
    steps: int = setting(2000, "optimizer steps of the whole run; with --resume, more extend it")
    learning_rate: float = setting(1e-3, "peak learning rate; from there it decays along a cosine to a tenth")
    warmup: int = setting(100, "steps of linear learning-rate warm-up")
    weight_decay: float = setting(0.1, "AdamW's weight decay, of matrices only")
    grad_clip: float = setting(1.0, "largest gradient norm; larger gradients are clipped to it")
    balance_loss: float = setting(
        0.0, "with --init-from a mixture of experts: weight of the loss that balances the experts' loads"
    )
    eval_interval: int = setting(200, "steps between evaluations, each of which prints a sample and saves a checkpoint")
    eval_windows: int = setting(256, "held-out windows that are evaluated, at most")
    seed: int = setting(0, "seed of the initial weights, batches and dropout")
    dtype: str = setting("float32", f"dtype of matrix products and attention, not of weights: {', '.join(DTYPES)}")

    lora: int = setting(0, "with --init-from: rank of LoRA adapters, which are trained in place of the weights; 0: none")
    lora_alpha: float = setting(16.0, "adapters are scaled by this over their rank")
    lora_targets: str = setting(",".join(TARGETS), "linear layers that get an adapter")
    weights: str = setting("stored", f"with --lora: the frozen matrices: {', '.join(WEIGHTS)}")

    def __post_init__(self):
        checked = {name: require_integer(name, getattr(self, name), 1) for name in (
            "heads", "width", "context", "batch_size", "steps", "eval_interval", "eval_windows",
        )}  # fmt: skip
        checked |= {name: require_integer(name, getattr(self, name), 0) for name in ("layers", "warmup", "lora")}
        checked |= {
            name: require_number(name, getattr(self, name), above=0) for name in ("learning_rate", "grad_clip", "lora_alpha")
        }
        checked["dropout"] = require_number("dropout", self.dropout, 0, below=1)
        checked["balance_loss"] = require_number("balance_loss", self.balance_loss, 0)
        checked["weight_decay"] = require_number("weight_decay", self.weight_decay, 0)
        checked["seed"] = require_integer("seed", self.seed, 0, 2**31 - 1)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("weights", self.weights, WEIGHTS)
        if self.weights != "stored" and not self.lora:
            raise ValueError(
                f"weights: expected lora with {self.weights}, since quantized weights are not trained, only adapters beside them"
            )
        if not isinstance(self.lora_targets, str) or not {*self.lora_targets.split(",")} <= {*TARGETS}:
            raise ValueError(f"lora_targets: expected some of {','.join(TARGETS)}, got {shown(self.lora_targets)}")
        for name, value in checked.items():  # NumPy's numbers as Python's
            object.__setattr__(self, name, value)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The configuration of a model that starts from random weights."""
    if config.width % config.heads:
        raise ValueError(f"width: expected a multiple of the {config.heads} heads, got {config.width}")
    bigram: dict[str, Any] = {"position": None, "tie_embeddings": False} if config.layers == 0 else {}
    try:
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=config.context,
            num_layers=config.layers,
            num_heads=config.heads,
            hidden_size=config.width,
            dropout=config.dropout,
            **bigram,
        )
    except ValueError as error:  # which names the field, not the setting
        name, _, problem = str(error).partition(":")
        raise ValueError(f"{SETTINGS.get(name, name)}:{problem}") from error
