"""Generation: prefill, the decode loop, sampling and streaming. It knows a decoder only by how it is called."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastgpt.cache import CACHE_KINDS, KVCache, PagedCache, Uncached


@dataclass(frozen=True)
class Options:
    """What `generate` can be told.

    use_cache: keep keys and values of past tokens; False recomputes all of them at every step.
    cache: "contiguous", "sliding" or "paged": see fastgpt/cache.py. The tokens are the same.
    cache_dtype: the weights' (default), torch.int8 or torch.float8_e4m3fn.
    window: tokens that one attends to, itself included; default all. A sliding cache needs it and keeps only these.
    page_size: tokens in a page of a paged cache.
    num_samples: continuations of each prompt, which is read once; in a paged cache they share its pages.
    temperature: 0 takes the most likely token, otherwise logits are divided by it and sampled.
    top_k: sample among the k most likely tokens only.
    top_p: sample among the most likely tokens that together have probability top_p only, 0 < top_p <= 1.
    seed: makes sampling repeatable.
    """

    use_cache: bool = True
    cache: str = "contiguous"
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    page_size: int = 16
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        for name in ("window", "page_size", "num_samples", "top_k"):
            value = getattr(self, name)
            optional = name in ("window", "top_k")
            if not (isinstance(value, int) and value >= 1) and not (optional and value is None):
                raise ValueError(f"{name}: expected an integer >= 1{' or None' if optional else ''}, got {value!r}")
        if self.cache not in CACHE_KINDS:
            raise ValueError(f"cache: expected one of {', '.join(map(repr, CACHE_KINDS))}, got {self.cache!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1 or None, got {self.top_p!r}")


def generate(model, ids, max_new_tokens: int, **options):
    """Continues each sequence by `max_new_tokens` tokens.

    Args:
        ids: (B, T) int64 token ids, T >= 1; or a list of B prompts of any length, each a list or 1-d tensor of ids.
        max_new_tokens: prompt and new tokens must fit into the model's context.
        options: see `Options`.

    Returns: (B · num_samples, T + max_new_tokens) int64, the prompt included, samples of a prompt one after the other;
        for a list of prompts a list of 1-d tensors.
    Raises: TypeError, ValueError, naming the argument.
    """
    new = list(stream(model, ids, max_new_tokens, **options))
    samples = options.get("num_samples", 1)
    if isinstance(ids, torch.Tensor):
        ids = ids.repeat_interleave(samples, dim=0)
        return torch.cat([ids, torch.stack(new, dim=1)], dim=1) if new else ids
    prompts = [prompt for prompt in as_prompts(model, ids) for _ in range(samples)]
    return [torch.cat([prompt, *(tokens[i : i + 1] for tokens in new)]) for i, prompt in enumerate(prompts)]


def stream(model, ids, max_new_tokens: int, **options) -> Iterator[torch.Tensor]:
    """Yields the next token of each sequence, (B · num_samples,) int64, as soon as it is known.

    Arguments and errors are those of `generate`; bad input raises here, not at the first token.
    """
    options = Options(**options)
    prompts = as_prompts(model, ids)
    check_lengths(model, prompts, max_new_tokens)
    cache = new_cache(model, prompts, max_new_tokens, options) if options.use_cache else None
    return _stream(model, prompts, max_new_tokens, cache, options)


@torch.inference_mode()
def _stream(model, prompts, max_new_tokens, cache, options):
    generator = None
    if options.temperature > 0:
        generator = torch.Generator(prompts[0].device)
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    training = model.training
    model.eval()
    try:
        if cache is None:
            steps = _uncached_steps(model, prompts, max_new_tokens, options)
        else:
            steps = _cached_steps(model, prompts, cache, options.num_samples)
        token = None
        for _ in range(max_new_tokens):
            token = sample(steps.send(token), options.temperature, options.top_k, options.top_p, generator)
            yield token
    finally:
        model.train(training)


def _cached_steps(model, prompts, cache: KVCache, num_samples: int) -> Generator[torch.Tensor, torch.Tensor, None]:
    """Yields the logits of each sequence's next token, (B · num_samples, V); is sent the token that was taken."""
    # The prompts whole, padded on the left: as the cache wants it, and the last column is the last token of each.
    lengths = [len(prompt) for prompt in prompts]
    ids = prompts[0].new_zeros(len(prompts), max(lengths))
    for row, prompt in zip(ids, prompts):
        row[len(row) - len(prompt) :] = prompt
    new = lengths if min(lengths) < max(lengths) else None
    logits = model.logits(model.hidden(ids, cache, new, last_only=True)[:, -1])
    if num_samples > 1:
        whole, cache = cache, cache.fork(num_samples)
        if isinstance(whole, PagedCache):
            whole.free()
        logits = logits.repeat_interleave(num_samples, dim=0)
    step = model.decoding(cache)
    while True:
        logits = step((yield logits))


def _uncached_steps(model, prompts, max_new_tokens, options) -> Generator[torch.Tensor, torch.Tensor, None]:
    """The same, everything computed anew at each step."""
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    # Padded on the right, where no token looks.
    longest = max(len(prompt) for prompt in prompts)
    ids = prompts[0].new_zeros(len(prompts), longest + max_new_tokens)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    rows = torch.arange(len(prompts), device=ids.device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    while True:
        hidden = model.hidden(ids[:, :longest], Uncached(options.window, ids.device))
        ids[rows, ends] = yield model.logits(hidden[rows, ends - 1])
        ends += 1
        longest += 1


def new_cache(model, prompts, max_new_tokens: int, options: Options) -> KVCache:
    """A cache with room for the request and no more. The last token is never stored."""
    lengths = [len(prompt) for prompt in prompts]
    new = max(max_new_tokens - 1, 0)
    page, samples = options.page_size, options.num_samples
    if samples == 1:
        num_pages = sum(-(-(length + new) // page) for length in lengths)
    else:  # shared pages of the prompt, and the rest of each sample
        num_pages = sum(length // page + samples * (-(-(length + new) // page) - length // page) for length in lengths)
    return model.new_cache(
        len(prompts), max(lengths) + new,
        kind=options.cache, cache_dtype=options.cache_dtype, window=options.window, page_size=page, num_pages=num_pages,
    )  # fmt: skip


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


def as_prompts(model, ids) -> list[torch.Tensor]:
    """The rows of ids, or of a list of prompts, as 1-d int64 tensors. Raises TypeError or ValueError."""
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape (B, T) or a list of prompts, got shape {tuple(ids.shape)}")
        prompts = list(ids)
    elif isinstance(ids, Sequence) and not isinstance(ids, str):
        device = next(model.parameters()).device
        prompts = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int64, device=device) for x in ids]
    else:
        raise TypeError(f"ids: expected a torch.Tensor or a list of prompts, got {type(ids).__name__}")
    if not prompts or any(prompt.dim() != 1 or len(prompt) == 0 for prompt in prompts):
        got = [tuple(prompt.shape) for prompt in prompts]
        raise ValueError(f"ids: expected at least one sequence, each of at least one token, got shapes {got}")
    for prompt in prompts:
        if prompt.dtype != torch.int64:
            raise TypeError(f"ids: expected dtype torch.int64, got {prompt.dtype}")
        low, high, vocab_size = prompt.min().item(), prompt.max().item(), model.config.vocab_size
        if low < 0 or high >= vocab_size:
            raise ValueError(f"ids: expected token ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")
    return prompts


def check_lengths(model, prompts, max_new_tokens):
    """Raises ValueError if prompts and new tokens do not fit into the model's context."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > model.config.context_length:
        raise ValueError(
            f"max_new_tokens: expected prompt and new tokens to fit into the context of "
            f"{model.config.context_length} tokens, got {longest} + {max_new_tokens}"
        )
