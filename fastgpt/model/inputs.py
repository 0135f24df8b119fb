"""Checks and conversions of token ids, prompts and lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastgpt.checks import make_list, require_device, require_dtype, require_tensor, shown
from fastgpt.model.config import GPTConfig


def require_decoder(model: Any) -> None:
    """Raises TypeError for what is not a decoder. A wrapper with a decoder's attributes, such as torch.compile's, is one."""
    if not isinstance(getattr(model, "config", None), GPTConfig) or not hasattr(model, "run_blocks"):
        raise TypeError(f"model: expected a fastgpt.GPT, got {type(model).__name__}")


def require_ids(ids: Any, device: torch.device) -> None:
    """Raises TypeError, ValueError unless ids are (B, T) integers, T >= 1, on the device."""
    require_tensor("ids", ids)
    require_dtype("ids", ids, (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids: expected shape (B, T) with at least one token, got {tuple(ids.shape)}")
    require_device("ids", ids, device)


def require_order(config: GPTConfig, in_order: bool) -> None:
    """Raises ValueError for a cache whose keys are not in the order of their positions, if the model has a bias by those."""
    if config.position == "relative" and not in_order:
        raise ValueError(
            "cache: expected a contiguous or a paged one for a model with relative positions, since a ring buffer has its keys in "
            "another order, got a sliding one"
        )


def as_lengths(name: str, lengths: Any, x: torch.Tensor) -> torch.Tensor:
    """Lengths of the sequences in x (B, T, ...), as a list or a tensor -> (B,) int32 on the device of x.

    Raises: TypeError, ValueError; a length outside 1 to T is not noticed on a GPU.
    """
    if isinstance(lengths, torch.Tensor):
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected integers, got {lengths.dtype}")
        numbers, shape = lengths.tolist() if lengths.is_cpu and lengths.dim() == 1 else [], tuple(lengths.shape)
    else:
        if not isinstance(lengths, Sequence) or not all(isinstance(n, int) for n in lengths):
            raise TypeError(f"{name}: expected a tensor or a list of integers, got {shown(lengths)}")
        numbers, shape = list(lengths), (len(lengths),)
    if shape != x.shape[:1] or not all(1 <= n <= x.shape[1] for n in numbers):
        got = numbers if shape == x.shape[:1] else f"shape {shape}"
        raise ValueError(f"{name}: expected {len(x)} lengths from 1 to {x.shape[1]} (the number of columns), got {got}")
    lengths = lengths if isinstance(lengths, torch.Tensor) else torch.tensor(numbers, dtype=torch.int32, device=x.device)
    return lengths.to(x.device, torch.int32)


class PromptTooLong(ValueError):
    """A prompt has more tokens than the model's context."""


def require_room(name: str, tokens: int, config: GPTConfig) -> None:
    """Raises PromptTooLong for a prompt that is longer than the model's context."""
    if tokens > config.context_length:
        raise PromptTooLong(
            f"{name}: expected a prompt of at most {config.context_length} tokens, the model's context, got {tokens}: "
            "shorten it, or choose a model with a longer context"
        )


def as_prompts(model: Any, ids: Any) -> list[torch.Tensor]:
    """A tensor or array (B, T), or a list of prompts, as a list of 1-d int64 tensors. Raises TypeError, ValueError."""
    require_decoder(model)
    return as_sequences(model, ids)


def as_sequences(model: Any, ids: Any) -> list[torch.Tensor]:
    """`as_prompts` for any model with a vocabulary."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("model: expected weights on a device with data, got the meta device")
    if isinstance(ids, np.ndarray):
        ids = as_integers(ids, model).to(device)
    if isinstance(ids, torch.Tensor):
        require_tensor("ids", ids)
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape (B, T) or a list of prompts, got shape {tuple(ids.shape)}")
        prompts = list(ids)
    elif is_several(ids):
        prompts = [as_prompt(prompt, model, device) for prompt in ids]
    else:
        raise TypeError(f"ids: expected a torch.Tensor or a list of prompts, got {type(ids).__name__}{make_list('ids', ids)}")
    if not prompts or any(prompt.dim() != 1 or len(prompt) == 0 for prompt in prompts):
        got = [tuple(prompt.shape) for prompt in prompts]
        raise ValueError(f"ids: expected at least one sequence, each of at least one token, got shapes {got}")
    for prompt in prompts:
        if prompt.dtype != torch.int64:
            raise TypeError(f"ids: expected dtype torch.int64, got {prompt.dtype}")
        if prompt.device != device:
            raise ValueError(f"ids: expected tokens on {device}, where the model is, got some on {prompt.device}")
    low, high = (bound.item() for bound in torch.cat(prompts).aminmax())
    require_in_vocabulary("ids", low if low < 0 else high, model)
    return prompts


def as_prompt(prompt: Any, model: Any, device: torch.device | str) -> torch.Tensor:
    if isinstance(prompt, torch.Tensor):
        require_tensor("ids", prompt)
        return prompt
    if isinstance(prompt, np.ndarray):
        return as_integers(prompt, model).to(device)
    try:
        ids = torch.tensor(prompt, device=device)
    except (TypeError, ValueError, RuntimeError):  # not numbers, or out of range
        ids = None
    if ids is not None and ids.numel() == 0:
        ids = ids.long()
    if ids is None or ids.dim() != 1 or ids.dtype != torch.int64:
        raise TypeError(f"ids: expected each prompt to be a list of integers or a 1-d tensor, got {shown(prompt)}")
    return ids


def as_integers(ids: np.ndarray, model: Any) -> torch.Tensor:
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids: expected integers, got an array of {ids.dtype}")
    if ids.dtype == np.uint64 and ids.size:  # it may not fit into int64
        require_in_vocabulary("ids", int(ids.max()), model)
    return torch.from_numpy(ids.astype(np.int64))


def require_in_vocabulary(name: str, token: int, model: Any) -> None:
    if not 0 <= token < model.config.vocab_size:
        raise ValueError(f"{name}: expected token ids from 0 to {model.config.vocab_size - 1}, got {token}")


def is_several(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
