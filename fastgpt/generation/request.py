"""A call of `generate`: prefill, the decode loop, and what later calls reuse."""

import contextlib
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastgpt.cache.base import KVCache
from fastgpt.cache.paged import PagedCache
from fastgpt.cache.uncached import Uncached
from fastgpt.checks import require_integer
from fastgpt.generation.config import MAX_NEW_TOKENS, GenerationConfig, defaults_of, integers
from fastgpt.generation.decoding import Passes, decoding
from fastgpt.generation.replay import Recording, has_graphs
from fastgpt.generation.sampling import Sampler, uniform_numbers
from fastgpt.generation.speculation import Drafts, ModelDrafts, PromptDrafts, RowSamplers, speculative_steps
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_decoder import EncoderDecoder
from fastgpt.model.encoder_states import EncoderKV, read_encoder_states
from fastgpt.model.evaluation_mode import evaluating, others
from fastgpt.model.fusion import BEFORE_WEIGHTS_MOVE
from fastgpt.model.inputs import as_prompts, require_in_vocabulary, require_room

MAX_ROWS = 2**20  # more are a mistake, and would take all memory before anything is generated
# Steps between checks whether all rows have ended, which on a GPU needs a device sync.
EOS_POLL_INTERVAL = {"cpu": 1, "cuda": 16}
PREFILL_CHUNK = {"cpu": 512, "cuda": 4096}
Session = tuple[Sampler | None, KVCache, Recording | Passes]


class Sessions:
    """What calls of `generate` reuse from earlier ones: sampler, cache and recorded steps, by model and by `session_key`.

    A call takes a session, and puts it back when it has ended, so that no two calls have the same one. A session is dropped
    when the model's modules or weights change, when the model is deleted, or when later sessions replace it.
    """

    MOST = 2  # of a model
    BYTES = 256 << 20  # of all their caches, or as many as the model's weights take

    def __init__(self):
        self.lock, self.of_model = threading.Lock(), weakref.WeakKeyDictionary()

    def take(self, model: GPT, key: tuple) -> Session | None:
        """The session of this key, or None."""
        with self.lock:
            kept = self.of_model.get(model, {})
            for old in [old for old, (_, _, recording) in kept.items() if not recording.holds()]:
                del kept[old]
            return kept.pop(key, None)

    def leave(self, model: GPT, key: tuple, session: Session) -> None:
        room = max(self.BYTES, sum(weight.nbytes for weight in model.parameters()))
        with self.lock:
            kept = self.of_model.setdefault(model, {})
            kept[key] = session
            while kept and (len(kept) > self.MOST or sum(cache.nbytes for _, cache, _ in kept.values()) > room):
                del kept[next(iter(kept))]  # the one that was left first

    def forget(self, model: torch.nn.Module) -> None:
        with self.lock:
            self.of_model.pop(model, None)


sessions = Sessions()
BEFORE_WEIGHTS_MOVE.append(sessions.forget)


class Kept:
    """The cache of a conversation, and the recorded steps over it, from one request to the next.

    cache: of one sequence, with the first tokens of the next prompt.
    recordings: by whether the request speculates.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.recordings: dict[bool, Any] = {}


def read(model: GPT, cache: KVCache, prompts: list[torch.Tensor], chunk: int) -> Iterator[torch.Tensor]:
    """Appends the prompts to the cache, in pieces of at most `chunk` tokens of each. Yields the hidden states (B, 1, C) of the last
    column of each piece; those of the last piece are of the last token of each prompt."""
    # Padded on the left: as the cache wants it, and the last column is the last token of each.
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids = prompts[0].new_zeros(len(lengths), longest)
    for row, prompt in zip(ids, prompts):
        row[longest - len(prompt) :] = prompt
    cache.expected_length = max(map(sum, zip(lengths, cache.counts)))
    pieces = -(-longest // chunk)
    size = -(-longest // pieces)  # as good as equal: no piece of a token or two at the end
    for begin in range(0, longest, size):
        end = min(begin + size, longest)
        new = [min(max(end - (longest - length), 0), end - begin) for length in lengths]
        padded = new if min(new) < end - begin else None
        yield model.hidden(ids[:, begin:end], cache, padded, last_only=True)


Step = Callable[[torch.Tensor], torch.Tensor]  # each row's last token (B · num_samples,) -> the next one


class Request:
    """A call of `generate` with checked arguments, and the memory for it.

    After a call with the same numbers of prompts and tokens and the same options, its memory and recorded steps are reused
    (`sessions`).

    rows: the prompts, each num_samples times.
    eos: tokens that end a row.
    max_new_tokens: an integer, also if None was passed.
    encoder_kv: keys and values for the model's cross-attention, one sequence for each prompt, or None.
    kept: the cache to go on with, or None.
    sampler: holds the results.
    """

    def __init__(
        self, model: GPT, prompts: list[torch.Tensor], max_new_tokens: int | None, options: GenerationConfig,
        encoder_kv: EncoderKV | None = None, kept: Kept | None = None,
    ):  # fmt: skip
        self.model, self.prompts, self.options, self.encoder_kv = model, prompts, options, encoder_kv
        self.eos = integers("eos", options.eos or ())
        self.max_new_tokens = self.checked(max_new_tokens)
        self.rows = [prompt for prompt in prompts for _ in range(options.num_samples)]
        self.shared: KVCache | None = None  # the cache in which samples of a prompt will go on
        self.recording: Any = None  # a Recording, or with speculation Passes
        self.key: tuple | None = None
        longest = max(map(len, prompts))
        # Where longrope rotates all keys anew, rows go in step, as the longest one decides for all.
        self.speculates = options.speculate is not None and not model.rope_factors_change(
            longest, longest + self.max_new_tokens
        )
        self.kept = kept
        if kept is not None:
            self.sampler, self.cache = self.new_sampler(self.uniforms()), kept.cache
            self.recording = kept.recordings.get(self.speculates)
            return
        uniforms, cache = self.uniforms(), self.cache_arguments()
        plain = not (options.logits_processors or isinstance(options.speculate, GPT))
        if options.use_cache and plain and encoder_kv is None:
            self.key = self.session_key(cache)
        session = None if self.key is None else sessions.take(model, self.key)
        if session is None:
            self.sampler = self.new_sampler(uniforms)
            self.cache = self.new_cache(cache) if options.use_cache else None
            return
        sampler, self.cache, self.recording = session
        with torch.inference_mode():  # in which a fork was made
            if sampler is None:
                self.sampler = self.new_sampler(uniforms)
            else:
                self.sampler = sampler
                self.sampler.reset(self.rows, uniforms)
            self.cache.truncate([0] * len(self.rows))
        if options.num_samples > 1:
            self.shared = self.cache
            self.cache = self.shared.like(len(prompts)) if isinstance(self.shared, PagedCache) else self.new_cache(cache)

    @classmethod
    def of(
        cls, model: GPT | EncoderDecoder, ids: torch.Tensor | np.ndarray | Sequence, max_new_tokens: Any, options: GenerationConfig,
        encoder_states: torch.Tensor | None = None, encoder_lengths: torch.Tensor | Sequence[int] | None = None,
        kept: Kept | None = None,
    ) -> "Request":  # fmt: skip
        """A request from the arguments of `generate`; of an encoder-decoder, to its decoder."""
        if isinstance(model, EncoderDecoder):
            if encoder_states is not None:
                raise ValueError(
                    "encoder_states: expected None for an encoder-decoder, which computes them from ids, got a tensor"
                )
            with torch.no_grad(), evaluating(others(model)):
                ids, encoder_states, encoder_lengths = model.begin(ids, encoder_lengths)
            model = model.decoder
        with torch.no_grad():
            encoder_kv = read_encoder_states(model, encoder_states, encoder_lengths)
        return cls(model, as_prompts(model, ids), max_new_tokens, options, encoder_kv, kept)

    def stream(self) -> Generator[Any, None, None]:
        """Yields what `fastgpt.stream` does."""
        with contextlib.closing(self.run()) as steps:
            for i in steps:
                tokens, logprobs = self.sampler.tokens, self.sampler.logprobs
                # Copies: a later call may write there.
                yield tokens[i].clone() if logprobs is None else (tokens[i].clone(), logprobs[i].clone())

    def run(self) -> Generator[int, None, None]:
        """Yields the number of each step when it has been launched. At the end, puts the session back for later calls."""
        try:
            yield from self.steps()
        except GeneratorExit:
            if not sys.is_finalizing():  # there is no next call
                self.leave()
            raise
        self.leave()

    def leave(self) -> None:
        # A captured step contains this request's sampler; passes and steps on a CPU do not.
        if self.kept is not None and self.recording is not None and (self.speculates or not has_graphs(self.rows[0].device)):
            self.kept.recordings[self.speculates] = self.recording
        if self.key is not None and self.recording is not None and self.recording.holds():
            self.recording.let_go()
            sampler = None
            if not self.speculates:
                sampler, self.sampler = self.sampler, self.sampler.results()  # before another thread may have it
            sessions.leave(self.model, self.key, (sampler, self.cache, self.recording))
            self.key = None

    @torch.inference_mode()
    def steps(self) -> Iterator[int]:
        if self.speculates:
            yield from speculative_steps(self)
            return
        model, sampler, look = self.model, self.sampler, EOS_POLL_INTERVAL[self.rows[0].device.type]
        foreign, step = others(model), None
        for i in range(self.max_new_tokens):
            with evaluating(foreign):  # and not while the caller has the token
                if step is None:
                    token, step = self.begin_uncached() if self.cache is None else self.begin_cached()
                elif self.cache is not None and model.rope_factors_change(self.cache.length, self.cache.length + 1):
                    token, step = self.recompute_cache(i)
                else:
                    token = step(token)
            looks = (i + 1) % look == 0 or i + 1 == self.max_new_tokens
            if looks:
                sampler.require_finite(range(i - i % look, i + 1))
            yield i
            if looks and sampler.ended is not None and sampler.ended.all():
                return

    def begin_cached(self) -> tuple[torch.Tensor, Step]:
        """The first new token of each row, and a function for the next ones."""
        return self.sampler(self.first_logits()), self.decoding()

    def first_logits(self) -> torch.Tensor:
        """Reads the prompts into the cache; the logits (B · num_samples, V) after them."""
        new = [prompt[stored:] for prompt, stored in zip(self.prompts, self.cache.counts)]
        logits, n = self.prefill(new), self.options.num_samples
        if n > 1:
            whole, self.cache = self.cache, self.cache.fork(n, self.shared)
            if isinstance(whole, PagedCache):
                whole.free()
            logits = logits.repeat_interleave(n, dim=0)
        return logits

    def drafts(self, samplers: RowSamplers) -> Drafts:
        draft = self.options.speculate
        if not isinstance(draft, GPT):
            return PromptDrafts(samplers)
        capacity = max(map(len, self.prompts)) + self.max_new_tokens
        return ModelDrafts(draft, samplers, self.drawn, self.options.rules, capacity)

    def recompute_cache(self, steps: int) -> tuple[torch.Tensor, Step]:
        """Recomputes the cache after so many steps, since the rotation of all keys has changed."""
        new = self.sampler.tokens[:steps].t().clamp(min=0)  # of rows that have ended: any
        self.cache.truncate([0] * len(self.rows))
        logits = self.prefill([torch.cat(row) for row in zip(self.rows, new)])
        return self.sampler(logits), self.decoding()

    def decoding(self) -> Step:
        if not self.options.logits_processors:
            step = decoding(self.model, self.cache, self.sampler, self.recording)
            self.recording = step.recording
            return step
        logits = decoding(self.model, self.cache)  # anybody's Python can be no part of a CUDA graph
        return lambda token: self.sampler(logits(token))

    def prefill(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        """Appends the prompts to the cache. Returns the logits (B, V) of the last token of each."""
        chunk = self.options.prefill_chunk or PREFILL_CHUNK[prompts[0].device.type]
        hidden = deque(read(self.model, self.cache, prompts, chunk), maxlen=1).pop()
        return self.model.logits(hidden[:, -1])

    def begin_uncached(self) -> tuple[torch.Tensor, Step]:
        """As `begin_cached`, without a cache: each step recomputes all tokens."""
        # Padded on the right, where no token looks.
        longest = max(len(row) for row in self.rows)
        ids = self.rows[0].new_zeros(len(self.rows), longest + self.max_new_tokens)
        for padded, row in zip(ids, self.rows):
            padded[: len(row)] = row
        rows = torch.arange(len(ids), device=ids.device)
        ends = torch.tensor([len(row) for row in self.rows], device=ids.device)

        def next_token():
            cache = Uncached(self.window, ids.device)
            if self.encoder_kv is not None:
                cache.encoder_kv = self.encoder_kv.repeated(self.options.num_samples)
            hidden = self.model.hidden(ids[:, :longest], cache)
            return self.sampler(self.model.logits(hidden[rows, ends - 1]))

        def step(token):
            nonlocal longest
            ids[rows, ends] = token
            ends.add_(1)
            longest += 1
            return next_token()

        return next_token(), step

    def new_cache(self, arguments: dict) -> KVCache:
        try:
            cache = self.model.new_cache(**arguments)
        except torch.OutOfMemoryError:  # which caches of earlier calls may have
            sessions.forget(self.model)
            cache = self.model.new_cache(**arguments)
        cache.encoder_kv = self.encoder_kv
        return cache

    def cache_arguments(self) -> dict:
        """The arguments of `new_cache`, with room for the request only. The last token is never stored."""
        lengths, options = [len(prompt) for prompt in self.prompts], self.options
        new = max(self.max_new_tokens - 1, 0)
        page, samples = min(options.page_size, max(lengths) + new), options.num_samples
        if samples == 1:
            num_pages = sum(-(-(length + new) // page) for length in lengths)
        else:  # shared pages of the prompt, and the rest of each sample
            num_pages = sum(length // page + samples * (-(-(length + new) // page) - length // page) for length in lengths)
        return {
            "batch_size": len(lengths), "capacity": max(lengths) + new, "kind": options.cache,
            "cache_dtype": options.cache_dtype, "window": self.window, "page_size": page, "num_pages": num_pages,
        }  # fmt: skip

    def session_key(self, cache: dict) -> tuple:
        """What determines the memory of a call, and what its steps compute."""
        options, device = self.options, self.rows[0].device
        rules = {name: value for name, value in options.rules.items() if name != "logit_bias"}
        return (
            *cache.values(), *rules.values(), *options.logit_bias.items(), options.num_samples, tuple(self.eos),
            options.return_logprobs, self.max_new_tokens, self.speculates, getattr(self.model, "key_dtype", None), device,
        )  # fmt: skip

    @property
    def window(self) -> int | None:
        window = self.options.window
        return None if window is None else min(window, self.model.config.context_length)

    def uniforms(self) -> torch.Tensor | None:
        """The uniform numbers to sample by, or None for greedy decoding."""
        options = self.options
        if options.temperature == 0:
            return None
        return uniform_numbers(seeds_of(options, len(self.prompts)), options.num_samples, self.max_new_tokens)

    def new_sampler(self, uniforms: torch.Tensor | None) -> Any:
        """A `Sampler`, or with speculation `RowSamplers`."""
        options, self.drawn = self.options, uniforms
        return (RowSamplers if self.speculates else Sampler)(
            self.rows, self.max_new_tokens, self.model.config.vocab_size, uniforms=uniforms, eos=self.eos,
            logprobs=options.return_logprobs, **options.rules,
        )  # fmt: skip

    def checked(self, max_new_tokens: int | None) -> int:
        """The number of new tokens. Raises ValueError if the request does not fit the model, or the seeds the prompts."""
        longest, options = max(map(len, self.prompts)), self.options
        require_room("ids", longest, self.model.config)
        new = new_tokens("max_new_tokens", max_new_tokens, longest, self.model)
        if options.max_batch is not None:
            raise ValueError(f"max_batch: expected None where all rows begin together, got {options.max_batch}")
        require_fitting(self.model, options, len(self.prompts))
        return new


def require_fitting(model: GPT, options: GenerationConfig, prompts: int) -> None:
    """Raises ValueError for options that fit this number of prompts not, or not the model."""
    if prompts * options.num_samples > MAX_ROWS:
        most = MAX_ROWS // prompts
        raise ValueError(f"num_samples: expected at most {most} of {prompts} prompts, got {options.num_samples}")
    if isinstance(options.seed, list) and len(options.seed) != prompts:
        raise ValueError(f"seed: expected one integer or {prompts}, one for each prompt, got {len(options.seed)}")
    if isinstance(draft := options.speculate, GPT):
        if draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"speculate: expected a model with the vocabulary of {model.config.vocab_size} tokens, got one of "
                f"{draft.config.vocab_size}"
            )
        if (device := draft.first_weight.device) != model.first_weight.device:
            raise ValueError(f"speculate: expected a model on {model.first_weight.device}, got one on {device}")
        if draft.config.cross_attention or not draft.config.causal:
            raise ValueError("speculate: expected a decoder without cross-attention, got another model")
    for name in ("eos", "logit_bias"):
        for token in getattr(options, name):
            require_in_vocabulary(name, token, model)


def new_tokens(name: str, number: int | None, length: int, model: GPT) -> int:
    """The number of new tokens after a prompt of `length`, where None is the default. Raises TypeError, ValueError."""
    room = model.config.context_length - length
    number = require_integer(name, number, least=0, optional=True)
    if number is None:
        return min(defaults_of(model).get("max_new_tokens", MAX_NEW_TOKENS), room)
    if number > room:
        raise ValueError(
            f"{name}: expected at most {room} after a prompt of {length} tokens in a context of {model.config.context_length}, "
            f"got {number}"
        )
    return number


def seeds_of(options: GenerationConfig, prompts: int) -> list[int]:
    """The seed of each prompt."""
    if options.seed is None:
        return torch.randint(2**63 - 1, (prompts,)).tolist()
    seeds = integers("seed", options.seed)
    return seeds if isinstance(options.seed, list) else seeds * prompts
