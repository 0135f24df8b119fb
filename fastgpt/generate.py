"""Generation: prefill, the decode loop and streaming. It knows a decoder only by how it is called."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastgpt.cache import CACHE_KINDS, KVCache, PagedCache, Uncached
from fastgpt.sampling import Sampler, uniform_numbers

# By device. To look whether all rows have ended is, on a GPU, to wait for it; so it is done after so many steps only.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 16}
PREFILL_CHUNK = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Options:
    """What `generate` can be told.

    Of tokens, in the order in which they apply (they are transformers'):
        repetition_penalty: of a token that is in the prompt or was generated, a positive logit is divided by it and a
            negative one multiplied; 1 is none. It applies to the most likely token too.
        temperature: 0 takes the most likely token, otherwise logits are divided by it and sampled.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together have probability top_p only, 0 < top_p <= 1.
        min_p: sample among tokens only that are at least min_p times as likely as the most likely one, 0 <= min_p <= 1.
        seed: makes sampling repeatable: with the same seed, a prompt is continued by the same tokens whatever the cache,
            the rest of the batch and the device, as far as logits are the same. One for all prompts, each of which is then
            sampled as it would be alone; or a list, one for each. Default: one for each prompt, drawn by PyTorch's
            generator (torch.manual_seed).
        num_samples: continuations of each prompt, which is read once; in a paged cache they share its pages.
        eos: a token, or several, that ends its row. Default: nothing does.
        return_logprobs: also returns the log-probability of each new token, by the logits as the model gave them, before
            all of the above: log_softmax in fp32.
    Of how they are computed:
        use_cache: keep keys and values of past tokens; False recomputes all of them at every step.
        cache: "contiguous", "sliding" or "paged": see fastgpt/cache.py. The tokens are the same.
        cache_dtype: the weights' (default), torch.int8 or torch.float8_e4m3fn.
        window: tokens that one attends to, itself included; default all. A sliding cache needs it and keeps only these.
        page_size: tokens in a page of a paged cache.
        prefill_chunk: longer prompts join the cache in pieces of at most so many tokens, so that memory for activations does
            not grow with the prompt. Default: 512 on a CPU, where it costs no time, 4,096 on a GPU.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | Sequence[int] | None = None
    num_samples: int = 1
    eos: int | Sequence[int] | None = None
    return_logprobs: bool = False
    use_cache: bool = True
    cache: str = "contiguous"
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    page_size: int = 16
    prefill_chunk: int | None = None

    def __post_init__(self):
        for name in ("window", "page_size", "num_samples", "top_k", "prefill_chunk"):
            value = getattr(self, name)
            optional = name in ("window", "top_k", "prefill_chunk")
            if not (isinstance(value, int) and value >= 1) and not (optional and value is None):
                raise ValueError(f"{name}: expected an integer >= 1{' or None' if optional else ''}, got {value!r}")
        if self.cache not in CACHE_KINDS:
            raise ValueError(f"cache: expected one of {', '.join(map(repr, CACHE_KINDS))}, got {self.cache!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1 or None, got {self.top_p!r}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 <= min_p <= 1 or None, got {self.min_p!r}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected a number > 0, got {self.repetition_penalty!r}")
        for seed in [] if self.seed is None else integers("seed", self.seed):
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed: expected integers from 0 to 2**64 - 1, got {seed}")
        integers("eos", () if self.eos is None else self.eos)

    @property
    def eos_ids(self) -> list[int]:
        return [] if self.eos is None else integers("eos", self.eos)


def generate(model, ids, max_new_tokens: int, **options):
    """Continues each sequence by `max_new_tokens` tokens, or up to a token that ends it.

    Args:
        ids: (B, T) int64 token ids, T >= 1; or a list of B prompts of any length, each a list or 1-d tensor of ids.
        max_new_tokens: prompt and new tokens must fit into the model's context.
        options: see `Options`.

    Returns: (B · num_samples, T + n) int64, the prompt included, samples of a prompt one after the other; n is
        max_new_tokens or the length of the longest row, and shorter rows are padded with the (first) eos. For a list of
        prompts, a list of 1-d tensors without padding.
        With return_logprobs also the log-probabilities of the new tokens, fp32: (B · num_samples, n), 0 where rows are
        padded; or a list of 1-d tensors.
    Raises: TypeError, ValueError, naming the argument.
    """
    request = Request(model, as_prompts(model, ids), max_new_tokens, Options(**options))
    for _ in request.run():
        pass
    new, options = request.sampler.tokens.t(), request.options  # (B · num_samples, max_new_tokens), -1 where a row has ended
    lengths = (new >= 0).sum(1).tolist()
    if isinstance(ids, torch.Tensor):
        new = new[:, : max(lengths)]
        new = new.where(new >= 0, options.eos_ids[0]) if options.eos_ids else new
        tokens = torch.cat([torch.stack(request.rows), new], dim=1)
    else:
        tokens = [torch.cat([row, more[:n]]) for row, more, n in zip(request.rows, new, lengths)]
    if not options.return_logprobs:
        return tokens
    logprobs = request.sampler.logprobs.t()[:, : max(lengths)]
    return tokens, logprobs if isinstance(ids, torch.Tensor) else [row[:n] for row, n in zip(logprobs, lengths)]


def stream(model, ids, max_new_tokens: int, **options) -> Iterator[torch.Tensor]:
    """Yields the next token of each sequence, (B · num_samples,) int64, as soon as it is known; -1 for those that have ended.

    With return_logprobs, yields pairs of that and of the log-probabilities (B · num_samples,) fp32. It ends when all
    sequences have. On a GPU this is seen at every 16th step only: the last ones may be -1 throughout.

    Arguments and errors are those of `generate`; bad input raises here, not at the first token.
    """
    return Request(model, as_prompts(model, ids), max_new_tokens, Options(**options)).run()


Step = Callable[[torch.Tensor], torch.Tensor]  # each row's last token (B · num_samples,) -> the next one


class Request:
    """A call of `generate`, checked, with all the memory that it takes.

    rows: the prompts, each num_samples times.
    """

    def __init__(self, model, prompts: list[torch.Tensor], max_new_tokens: int, options: Options):
        self.model, self.prompts, self.max_new_tokens, self.options = model, prompts, max_new_tokens, options
        self.check()
        self.rows = [prompt for prompt in prompts for _ in range(options.num_samples)]
        self.sampler = self.new_sampler()
        self.cache = self.new_cache() if options.use_cache else None

    @torch.inference_mode()
    def run(self) -> Iterator:
        """What `stream` yields."""
        model, sampler = self.model, self.sampler
        training, look = model.training, STEPS_PER_LOOK[self.rows[0].device.type]
        model.eval()
        try:
            step = None
            for i in range(self.max_new_tokens):
                if step is None:
                    token, step = self.begin_uncached() if self.cache is None else self.begin_cached()
                elif self.cache is not None and model.turns(self.cache.length, self.cache.length + 1):
                    token, step = self.begin_again(i)
                else:
                    token = step(token)
                yield sampler.tokens[i] if sampler.logprobs is None else (sampler.tokens[i], sampler.logprobs[i])
                if sampler.ended is not None and (i + 1) % look == 0 and sampler.ended.all():
                    return
        finally:
            model.train(training)

    def begin_cached(self) -> tuple[torch.Tensor, Step]:
        """The first new token of each row, and a function for the next ones."""
        logits, n = self.prefill(self.prompts), self.options.num_samples
        if n > 1:
            whole, self.cache = self.cache, self.cache.fork(n)
            if isinstance(whole, PagedCache):
                whole.free()
            logits = logits.repeat_interleave(n, dim=0)
        return self.sampler(logits), self.model.decoding(self.cache, self.sampler)

    def begin_again(self, steps: int) -> tuple[torch.Tensor, Step]:
        """After so many steps, all rows anew: the model keeps other keys from now on."""
        new = self.sampler.tokens[:steps].t().clamp(min=0)  # of rows that have ended: any
        self.cache.truncate([0] * len(self.rows))
        logits = self.prefill([torch.cat(row) for row in zip(self.rows, new)])
        return self.sampler(logits), self.model.decoding(self.cache, self.sampler)

    def prefill(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        """Lets the prompts join the cache. Returns the logits of the last token of each, (B, V)."""
        # Padded on the left: as the cache wants it, and the last column is the last token of each.
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = prompts[0].new_zeros(len(lengths), longest)
        for row, prompt in zip(ids, prompts):
            row[longest - len(prompt) :] = prompt
        self.cache.reach = longest
        pieces = -(-longest // (self.options.prefill_chunk or PREFILL_CHUNK[ids.device.type]))
        size = -(-longest // pieces)  # as good as equal: no piece of a token or two at the end
        for begin in range(0, longest, size):
            end = min(begin + size, longest)
            new = [min(max(end - (longest - length), 0), end - begin) for length in lengths]
            new = new if min(new) < end - begin else None
            hidden = self.model.hidden(ids[:, begin:end], self.cache, new, last_only=True)
        return self.model.logits(hidden[:, -1])

    def begin_uncached(self) -> tuple[torch.Tensor, Step]:
        """As `begin_cached`, but everything is computed anew at each step."""
        # Padded on the right, where no token looks.
        longest = max(len(row) for row in self.rows)
        ids = self.rows[0].new_zeros(len(self.rows), longest + self.max_new_tokens)
        for padded, row in zip(ids, self.rows):
            padded[: len(row)] = row
        rows = torch.arange(len(ids), device=ids.device)
        ends = torch.tensor([len(row) for row in self.rows], device=ids.device)

        def next_token():
            hidden = self.model.hidden(ids[:, :longest], Uncached(self.options.window, ids.device))
            return self.sampler(self.model.logits(hidden[rows, ends - 1]))

        def step(token):
            nonlocal longest
            ids[rows, ends] = token
            ends.add_(1)
            longest += 1
            return next_token()

        return next_token(), step

    def new_cache(self) -> KVCache:
        """With room for the request and no more. The last token is never stored."""
        lengths, options = [len(prompt) for prompt in self.prompts], self.options
        new = max(self.max_new_tokens - 1, 0)
        page, samples = options.page_size, options.num_samples
        if samples == 1:
            num_pages = sum(-(-(length + new) // page) for length in lengths)
        else:  # shared pages of the prompt, and the rest of each sample
            num_pages = sum(length // page + samples * (-(-(length + new) // page) - length // page) for length in lengths)
        return self.model.new_cache(
            len(lengths), max(lengths) + new, kind=options.cache, cache_dtype=options.cache_dtype, window=options.window,
            page_size=page, num_pages=num_pages,
        )  # fmt: skip

    def new_sampler(self) -> Sampler:
        options, uniforms = self.options, None
        if options.temperature > 0:
            seeds = options.seed
            if seeds is None:
                seeds = torch.randint(2**63 - 1, (len(self.prompts),)).tolist()
            elif not isinstance(seeds, Sequence):
                seeds = [seeds] * len(self.prompts)
            uniforms = uniform_numbers(seeds, options.num_samples, self.max_new_tokens)
        return Sampler(
            self.rows, self.max_new_tokens, self.model.config.vocab_size, uniforms=uniforms, eos=options.eos_ids,
            logprobs=options.return_logprobs, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            min_p=options.min_p, repetition_penalty=options.repetition_penalty,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError if the request does not fit the model, or the seeds the prompts."""
        new, context, longest = self.max_new_tokens, self.model.config.context_length, max(map(len, self.prompts))
        if not isinstance(new, int) or new < 0:
            raise ValueError(f"max_new_tokens: expected an integer >= 0, got {new!r}")
        if longest > context:
            raise ValueError(f"ids: expected prompts of at most {context} tokens (the context), got one of {longest}")
        if longest + new > context:
            raise ValueError(
                f"max_new_tokens: expected prompt and new tokens to fit into the context of {context} tokens, "
                f"got {longest} + {new}"
            )
        seed, prompts = self.options.seed, len(self.prompts)
        if isinstance(seed, Sequence) and len(seed) != prompts:
            raise ValueError(f"seed: expected one integer or {prompts}, one for each prompt, got {len(seed)}")
        for token in self.options.eos_ids:
            require_in_vocabulary("eos", token, self.model)


def as_prompts(model, ids) -> list[torch.Tensor]:
    """The rows of ids, or of a list of prompts, as 1-d int64 tensors. Raises TypeError or ValueError."""
    device = next(model.parameters()).device
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape (B, T) or a list of prompts, got shape {tuple(ids.shape)}")
        prompts = list(ids)
    elif isinstance(ids, Sequence) and not isinstance(ids, str):
        prompts = [as_prompt(prompt, device) for prompt in ids]
    else:
        raise TypeError(f"ids: expected a torch.Tensor or a list of prompts, got {type(ids).__name__}")
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


def as_prompt(prompt, device) -> torch.Tensor:
    if isinstance(prompt, torch.Tensor):
        return prompt
    try:
        ids = torch.tensor(prompt, device=device)
    except (TypeError, ValueError, RuntimeError):  # not numbers, or too large
        ids = None
    if ids is not None and ids.numel() == 0:
        ids = ids.long()
    if ids is None or ids.dim() != 1 or ids.dtype != torch.int64:
        shown = repr(prompt) if len(repr(prompt)) < 50 else f"a {type(prompt).__name__}"
        raise TypeError(f"ids: expected each prompt to be a list of integers or a 1-d tensor, got {shown}")
    return ids


def require_in_vocabulary(name: str, token: int, model) -> None:
    if not 0 <= token < model.config.vocab_size:
        raise ValueError(f"{name}: expected token ids from 0 to {model.config.vocab_size - 1}, got {token}")


def integers(name: str, value: int | Sequence[int]) -> list[int]:
    """One integer or several, as a list. Raises TypeError."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(isinstance(x, int) for x in values):
        raise TypeError(f"{name}: expected an integer or a list of integers, got {value!r}")
    return values
