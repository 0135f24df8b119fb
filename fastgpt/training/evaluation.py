"""How well a decoder predicts a text that it was not trained on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastgpt.checks import require_integer
from fastgpt.model.decoder import GPT
from fastgpt.model.evaluation_mode import evaluating, others
from fastgpt.training.processes import Processes


def split(tokens: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 90% of the tokens to train on and the last 10%, held out. Raises ValueError when either is too short."""
    held_out = len(tokens) // 10
    if held_out < 2 or len(tokens) - held_out <= context:
        needed = max(20, context + 1 + context // 9)  # the smallest number that passes
        raise ValueError(f"text: expected at least {needed} tokens for a context of {context}, got {len(tokens)}")
    return tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]


@torch.inference_mode()
def evaluate(
    model: GPT, tokens: torch.Tensor, max_windows: int | None = None, cache_dtype: torch.dtype | None = None,
    *, context: int | None = None, overlap: int = 0, processes: Processes = Processes(),
    shown: Callable[[int], object] = lambda count: None,
) -> float:  # fmt: skip
    """Mean loss of predicting each of `tokens` (N,) but the first, in nats per token.

    The text is read in windows of `context` tokens, by default the model's: all of them, or `max_windows` that are spread
    evenly. The first `overlap` tokens of a window are the last of the one before, and are predicted there only. With a `cache_dtype`, keys and values pass through a cache of that dtype, which shows the
    loss from quantizing them. Processes share the windows. `shown` is called with the number of tokens that each window
    predicted. The model's training mode does not matter, and does not change.

    Raises: TypeError or ValueError that begins with the argument's name.
    """
    require_integer("max_windows", max_windows, 1, optional=True)
    context = require_integer("context", context, 1, optional=True) or model.config.context_length
    require_integer("overlap", overlap, 0, context - 1)
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least two, of which the second is predicted, got {len(tokens)}")
    device = model.first_weight.device
    starts = [0, *range(context - overlap, len(tokens) - 1 - overlap, context - overlap)]
    if max_windows is not None and len(starts) > max_windows:
        starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    with evaluating(others(model)):
        for i in range(processes.rank, -(-len(starts) // processes.size) * processes.size, processes.size):
            start = starts[min(i, len(starts) - 1)]  # with FSDP every process must call the model equally often
            window = tokens[start : start + context + 1].to(device, torch.int64)
            cache = None if cache_dtype is None else model.new_cache(1, cache_dtype=cache_dtype)
            logits = model(window[None, :-1], cache=cache)[0].float()
            if i < len(starts):
                begin = overlap if start else 0
                loss = F.cross_entropy(logits[begin:], window[1 + begin :], reduction="sum")
                total += torch.stack([loss, torch.full_like(loss, len(window) - 1 - begin)])
                shown(len(window) - 1 - begin)
    loss, count = processes.sum(total).tolist()
    return loss / count
