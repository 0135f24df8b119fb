"""A mixture of experts in place of an MLP: each token is routed to some of the experts, which are MLPs."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from fastgpt.model.config import GPTConfig
from fastgpt.model.evaluation_mode import is_training
from fastgpt.model.fusion import computes, plain
from fastgpt.model.layers import MLP, Norm, new_layer, project
from fastgpt.ops.linear import finish
from fastgpt.ops.moe import moe, moe_waits
from fastgpt.ops.quantized_weight import QuantizedWeight
from fastgpt.ops.route import route


@plain(weights=5)
class MoE(nn.Module):
    """residual + the weighted outputs of the experts that a token is routed to, plus that of the shared expert, if there is one.

    up: (E, 2I, C), or (E, I, C) without a gate; down: (E, C, I); up_bias, down_bias: (E, 2I or I) and (E, C), or None.
    selection_bias: (E,) fp32, which balances the load of experts and has no gradient, or None.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        E, C, I = config.num_experts, config.hidden_size, config.expert_size
        self.dropout, self.top_k, self.in_fp32 = config.dropout, config.experts_per_token, config.router_fp32
        self.routing = {
            "scoring": config.router_scoring, "num_groups": config.router_groups, "top_groups": config.router_top_groups,
            "group_score": config.router_group_score, "normalize": config.router_normalize, "scale": config.router_scale,
        }  # fmt: skip
        self.activation, self.gated = config.activation, config.gated
        self.router = new_layer(nn.Linear, C, E, bias=config.router_bias)
        rows = 2 * I if config.gated else I
        self.up, self.down = nn.Parameter(torch.empty(E, rows, C)), nn.Parameter(torch.empty(E, C, I))
        for name, shape in (("up_bias", (E, rows)), ("down_bias", (E, C))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if config.mlp_bias else None)
        selection_bias = nn.Parameter(torch.zeros(E), requires_grad=False) if config.router_selection_bias else None
        self.register_parameter("selection_bias", selection_bias)
        self.shared = self.shared_gate = None
        if config.shared_expert_size is not None:
            self.shared = MLP(config, config.shared_expert_size, post_norm=False)
            self.shared.dropout = 0.0  # there is one for all experts together
            self.shared_gate = new_layer(nn.Linear, C, 1, bias=False) if config.shared_expert_gate else None
        self.post_norm = Norm(config, C) if config.post_norms else None

    def forward(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor) -> torch.Tensor:
        """x, residual (B, T, C) -> (B, T, C)."""
        x = x if norm is None else norm(x)
        dropout_p = self.dropout if is_training(self) else 0.0
        # Where nothing is computed from their sum alone, the residual is added in the same operation.
        out = residual if self.post_norm is None and not dropout_p else None
        if self.shared is not None:
            out = self._shared(x, out)
        weights = self._parameters
        out = moe(
            x, *self._route(x), weights["up"], weights["down"],
            up_bias=weights["up_bias"], down_bias=weights["down_bias"], activation=self.activation, gated=self.gated, residual=out,
        )  # fmt: skip
        if self.post_norm is not None:
            out = finish(out, dropout_p=dropout_p)
            return (
                self.post_norm(out, residual=residual)
                if computes(self.post_norm, Norm.forward)
                else residual + self.post_norm(out)
            )
        return finish(out, dropout_p=dropout_p, residual=residual) if dropout_p else out

    def router_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized x (..., C) -> (..., E)."""
        return project(x.to(self.router.weight.dtype) if self.in_fp32 else x, self.router)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized x (..., C) -> experts and weights, (..., K) each."""
        logits, bias = self.router_logits(x), self._parameters["selection_bias"]
        if bias is not None:
            bias = bias.to(torch.float64 if logits.dtype is torch.float64 else torch.float32)
        return route(logits, self.top_k, selection_bias=bias, **self.routing)

    def graph_refused(self, rows: int) -> str | None:
        """Why a pass of so many tokens on a GPU cannot be captured in a CUDA graph, or None."""
        weights = [(self.up, self.down)]
        if self.shared is not None and self.shared_gate is not None:
            weights.append((self.shared.up.weight, self.shared.down.weight))
        return next((reason for up, down in weights if (reason := moe_waits(up, down, rows)) is not None), None)

    def _shared(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """residual + shared(x), or with a gate residual + sigmoid(gate(x)) · shared(x)."""
        mlp = self.shared
        if self.shared_gate is None:
            return mlp(x, None, residual)
        logits = project(x, self.shared_gate)
        layers = computes(mlp.up, nn.Linear.forward) and computes(mlp.down, nn.Linear.forward)
        if not layers or not computes(mlp, MLP.forward):
            y = torch.sigmoid(logits) * mlp(x, None, None)
            return y if residual is None else residual + y
        # As a mixture of one expert, whose weight is the sigmoid: an operation that a recorded step has.
        up, down = (_of_one_expert(layer.weight) for layer in (mlp.up, mlp.down))
        up_bias, down_bias = (None if layer.bias is None else layer.bias[None] for layer in (mlp.up, mlp.down))  # type: ignore[index]
        return moe(
            x, *route(logits, 1, scoring="sigmoid"), up, down, up_bias=up_bias, down_bias=down_bias, activation=self.activation,
            gated=self.gated, residual=residual,
        )  # fmt: skip


def _of_one_expert(weight: torch.Tensor) -> torch.Tensor:
    return weight if isinstance(weight, QuantizedWeight) else weight[None]


@contextlib.contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A context manager: the routers' logits (..., E) of each layer with experts are added to the list that it gives, pass by
    pass."""
    found: list[torch.Tensor] = []
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    hooks = [router.register_forward_hook(lambda router, inputs, logits: found.append(logits)) for router in routers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def load_balancing_loss(logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """The auxiliary loss that is smallest where all experts get as many tokens, over all layers and tokens together:

        E · sum over e of f_e · P_e,    f_e: experts e chosen per token, P_e: the mean of softmax(logits)_e

    Args:
        logits: of each router, (..., E).
        top_k: experts of a token.

    Returns: a scalar, fp32; top_k if they are balanced.
    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6, for top_k experts as transformers computes it.
    """
    scores = torch.cat([x.float().flatten(0, -2) for x in logits]).softmax(-1)  # (R, E)
    chosen = torch.zeros_like(scores).scatter(-1, scores.detach().topk(top_k, -1).indices, 1.0)
    return scores.shape[-1] * (chosen.mean(0) * scores.mean(0)).sum()
