"""What families with mixtures of experts have in common."""

from typing import Any

from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.families.fields import EXPERTS, expect
from fastgpt.schema import integer, number, several

LAYER_NUMBERS = several(integer(0, 2**16), (), optional=True)
# Of training; without router_aux_loss_coef there is no such loss.
ROUTER_ENTRIES = {"router_jitter_noise": number(0.0, least=0, most=1e6), "num_experts_per_tok": EXPERTS}


def experts_of(config: dict, *names: str) -> int:
    """The number of experts, under any of these names, in the order of preference."""
    number = next((config[name] for name in names if config[name] is not None), None)
    expect(number is not None, names[0], "the number of experts", None)
    used = config["num_experts_per_tok"]
    expect(used <= number, "num_experts_per_tok", f"at most {names[0]}={number}", used)
    return number  # type: ignore[return-value]  # not None


def layers_with_experts(config: dict) -> tuple[bool, ...] | None:
    """As mlp_only_layers and decoder_sparse_step say; None: all."""
    dense, step = config["mlp_only_layers"] or (), config["decoder_sparse_step"]
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(config["num_hidden_layers"]))
    return None if all(layers) else layers


def dense_layers(config: Any) -> list[int]:
    """GPTConfig -> mlp_only_layers."""
    return [i for i in range(config.num_layers) if not config.has_experts(i)]


def expert_names(
    module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, str | tuple[str, ...]]:
    """`Family.names` of experts whose matrices are stored one by one.

    module: of a layer's mixture of experts, without the layers before it.
    """
    experts = f"layers.{{i}}.{module}.experts.{{e}}"
    return {
        "blocks.{i}.mlp.router": f"layers.{{i}}.{module}.gate",
        "blocks.{i}.mlp.experts.up": (f"{experts}.{gate}", f"{experts}.{up}"),
        "blocks.{i}.mlp.experts.down": f"{experts}.{down}",
    }


def fused_experts(names: dict, module: str = "mlp") -> dict[str, Fused]:
    """`Family.fused` of what transformers 5 has in memory."""
    experts = f"layers.{{i}}.{module}.experts"
    return {
        f"{experts}.gate_up_proj": Fused(tuple(f"{name}.weight" for name in names["blocks.{i}.mlp.experts.up"])),
        f"{experts}.down_proj": Fused((f"{names['blocks.{i}.mlp.experts.down']}.weight",)),
    }
