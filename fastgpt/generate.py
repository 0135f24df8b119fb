"""Generation: prefill, the decode loop, sampling and streaming. It knows a decoder only by how it is called."""

from collections.abc import Iterator

import torch


def stream(
    model, ids, max_new_tokens, *, use_cache=True, temperature=0.0, top_k=None, top_p=None, seed=None
) -> Iterator[torch.Tensor]:
    """Yields the next token of each sequence, (B,) int64, as soon as it is known.

    Arguments and errors are those of `generate`; bad input raises here, not at the first token.
    """
    check_request(model, ids, max_new_tokens, temperature, top_k, top_p)
    return _stream(model, ids, max_new_tokens, use_cache, temperature, top_k, top_p, seed)


@torch.inference_mode()
def _stream(model, ids, max_new_tokens, use_cache, temperature, top_k, top_p, seed):
    B, T = ids.shape
    generator = None
    if temperature > 0:
        generator = torch.Generator(ids.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
    training = model.training
    model.eval()
    try:
        tokens = ids.new_empty(B, T + max_new_tokens)  # (B, T + new) everything so far, to the left of `length`
        tokens[:, :T] = ids
        cache = model.new_cache(B, T + max_new_tokens) if use_cache else None
        for length in range(T, T + max_new_tokens):
            # With a cache: the whole prompt once, then one token at a time. Without: everything, at every step.
            start = 0 if cache is None else cache.length
            logits = model.logits(model.hidden(tokens[:, start:length], cache)[:, -1])  # (B, V)
            tokens[:, length] = sample(logits, temperature, top_k, top_p, generator)
            yield tokens[:, length]
    finally:
        model.train(training)


def generate(model, ids, max_new_tokens, *, use_cache=True, temperature=0.0, top_k=None, top_p=None, seed=None):
    """Continues each sequence by `max_new_tokens` tokens.

    Args:
        ids: (B, T) int64 token ids, T >= 1.
        max_new_tokens: T + max_new_tokens must fit into the model's context.
        use_cache: keep keys and values of past tokens; False recomputes all of them at every step.
        temperature: 0 takes the most likely token, otherwise logits are divided by it and sampled.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together have probability top_p only, 0 < top_p <= 1.
        seed: makes sampling repeatable.

    Returns: (B, T + max_new_tokens) int64, the prompt included.
    Raises: TypeError, ValueError, naming the argument.
    """
    new = list(
        stream(
            model, ids, max_new_tokens, use_cache=use_cache, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
    )
    return torch.cat([ids, torch.stack(new, dim=1)], dim=1) if new else ids.clone()


def sample(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """One token from each row of logits (B, V): the most likely at temperature 0, else a random draw. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens: the first is always kept
        beyond = before >= top_p  # in order of likelihood; scattered back to the order of the vocabulary
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def check_request(model, ids, max_new_tokens, temperature, top_k, top_p):
    """Raises TypeError or ValueError, naming the argument, for what `generate` cannot do."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"ids: expected shape (B, T) with at least one sequence and one token, got {tuple(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected dtype torch.int64, got {ids.dtype}")
    low, high, vocab_size = ids.min().item(), ids.max().item(), model.config.vocab_size
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids: expected token ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    if ids.shape[1] + max_new_tokens > model.config.context_length:
        raise ValueError(
            f"max_new_tokens: expected prompt and new tokens to fit into the context of "
            f"{model.config.context_length} tokens, got {ids.shape[1]} + {max_new_tokens}"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected an integer >= 1 or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1 or None, got {top_p!r}")
