"""The options of `generate`, and the defaults that a checkpoint has for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastgpt.cache.base import MAX_STEPS
from fastgpt.cache.create import CACHE_KINDS
from fastgpt.checks import require_choice, require_flag, require_integer, shown
from fastgpt.generation.sampling import Processor, checked_rules
from fastgpt.model.decoder import GPT
from fastgpt.model.inputs import is_several

MAX_NEW_TOKENS = 300  # where neither the caller nor the checkpoint says how many


@dataclass(frozen=True)
class GenerationConfig:
    """The options of `generate`.

    An option that is passed wins, even None; then the checkpoint's default (`model.generation_defaults`, read from its
    generation_config.json); then the default here. Options are independent: with temperature=0.5 the checkpoint's top_k still
    applies, unless top_k=None is passed.

    How tokens are chosen, in the order in which the options apply (the order of transformers):
        logit_bias: token id -> number to add to its logit; -inf bans the token.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that are in the prompt or
            were generated; 1 is off. It applies to greedy decoding, too.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice in prompt and new tokens; 0 is off.
        min_new_tokens: eos tokens are banned until a row has this many new tokens.
        logits_processors: one or more functions, called at each step with the token ids (B, T) int64 of the rows so far,
            prompts included, and their logits (B, V) fp32, which may be modified in place; returns (B, V). Those of
            transformers work. Rows with prompts of different lengths are not padded: each length is a call of its own, with
            its rows in order. Rows that have ended are included, with eos as their tokens. With processors, choosing the token
            is not part of the CUDA graph.
        temperature: 0 is greedy decoding; otherwise logits are divided by it, and tokens are sampled.
        top_k: sample from the k most likely tokens.
        top_p: sample from the smallest set of most likely tokens with total probability top_p, 0 < top_p <= 1.
        min_p: sample from tokens that are at least min_p times as likely as the most likely one, 0 <= min_p <= 1.
        seed: the same seed gives the same tokens for a prompt, whatever the cache, the rest of the batch and the device, as
            long as logits are the same. One seed for all prompts, each of which is then sampled as it would be alone, or a list
            with one for each. Default: drawn for each prompt from PyTorch's generator (torch.manual_seed).
        num_samples: continuations of each prompt; its prefill runs once, and in a paged cache they share its pages.
        eos: the token, or tokens, that end a row; None or () for none.
        return_logprobs: also return the log-probability of each new token: log_softmax in fp32 of the model's logits, before
            any of the above.
    How they are computed:
        use_cache: cache keys and values of past tokens; False recomputes them at every step.
        cache: "contiguous", "sliding" or "paged": see fastgpt/cache/base.py. The tokens are the same.
        cache_dtype: dtype of keys and values: that of the weights (default), torch.int8 or torch.float8_e4m3fn.
        window: number of tokens that a token attends to, itself included; default all. A sliding cache needs it, and keeps only
            these.
        page_size: tokens per page of a paged cache.
        prefill_chunk: longer prompts are prefilled in chunks of at most this many tokens, so that memory for activations does
            not grow with the prompt. Default: 512 on a CPU, where it costs no time, 4,096 on a GPU.
        max_batch: the most rows that are generated together; further prompts wait, and join as soon as a row has ended. They may be
            thousands, and `max_new_tokens` a list with a number for each. A prompt's tokens are those it would have alone. Keys
            and values are in pages whatever `cache` says, and prompts that begin alike share them. logits_processors are called
            for one row at a time. Default: all rows begin together, or if max_new_tokens is a list or there are more than 64
            prompts of their own lengths, as many as memory has room for and as yield more tokens per second. See
            docs/many-prompts.md.
        speculate: guess next tokens and check several in one pass; the tokens are the same. "prompt": guesses are what followed
            the last tokens before, in prompt or new tokens; or a GPT with the same vocabulary, which guesses. Rows then go at
            their own pace, so logits_processors are called for one row at a time, and those of rows that have ended are not.
        speculate_tokens: the most guesses in a pass, from 1 to 7; default: as many as pay, by how many were right and by what
            passes take. A pass has no more tokens, of all rows together, than those whose results have the bits of one token's:
            see the documentation of speculation.

    Raises: TypeError, ValueError, naming the option.
    """

    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logits_processors: Processor | Sequence[Processor] = ()
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
    max_batch: int | None = None
    speculate: str | GPT | None = None
    speculate_tokens: int | None = None

    def __post_init__(self):
        checked = checked_rules(**self.rules)
        for name in ("window", "prefill_chunk", "max_batch"):
            checked[name] = require_integer(name, getattr(self, name), least=1, optional=True)
        checked["page_size"] = require_integer("page_size", self.page_size, least=1)
        checked["num_samples"] = require_integer("num_samples", self.num_samples, least=1)
        for name in ("return_logprobs", "use_cache"):
            require_flag(name, getattr(self, name))
        require_choice("cache", self.cache, CACHE_KINDS)
        if not (self.speculate is None or self.speculate == "prompt" or isinstance(self.speculate, GPT)):
            kind = TypeError if not isinstance(self.speculate, str) else ValueError
            raise kind(f'speculate: expected "prompt", a GPT or None, got {shown(self.speculate)}')
        if self.speculate is not None and not self.use_cache:
            raise ValueError("speculate: expected None with use_cache=False, since a pass would recompute all tokens")
        checked["speculate_tokens"] = require_integer(
            "speculate_tokens", self.speculate_tokens, 1, MAX_STEPS - 1, optional=True
        )
        if self.speculate is None and self.speculate_tokens is not None:
            raise ValueError(f"speculate_tokens: expected None without speculate, got {self.speculate_tokens}")
        if not isinstance(self.cache_dtype, torch.dtype | None):
            raise TypeError(f"cache_dtype: expected a torch.dtype or None, got {shown(self.cache_dtype)}")
        if self.seed is not None:
            seeds = integers("seed", self.seed)
            if not all(0 <= seed < 2**64 for seed in seeds):
                raise ValueError(f"seed: expected integers from 0 to 2**64 - 1, got {shown(self.seed)}")
            checked["seed"] = seeds if is_several(self.seed) else seeds[0]
        checked["eos"] = [] if self.eos is None else integers("eos", self.eos)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def rules(self) -> dict:
        """Those of how a token is chosen, which a `Sampler` wants."""
        return {name: getattr(self, name) for name in checked_rules.__kwdefaults__ or ()}

    @classmethod
    def of(cls, model: Any, given: dict) -> "GenerationConfig":
        """What a call was given, and for the rest the defaults of the model's checkpoint."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"{name}: unexpected keyword argument {name!r}, expected one of {', '.join(known)}")
        return cls(**{name: value for name, value in defaults_of(model).items() if name != "max_new_tokens"} | given)


def defaults_of(model: Any) -> dict[str, Any]:
    """Options by their names, and max_new_tokens, that the model's checkpoint gives."""
    defaults = dict(getattr(model, "generation_defaults", {}))
    if "eos" in defaults:  # some name tokens that the vocabulary lacks
        defaults["eos"] = [token for token in integers("eos", defaults["eos"]) if token < model.config.vocab_size]
    return defaults


def integers(name: str, value: Any) -> list[int]:
    """One integer or several, as a list. Raises TypeError."""
    try:
        return [require_integer(name, x) for x in (value if is_several(value) else [value])]
    except TypeError:
        raise TypeError(f"{name}: expected an integer or a list of integers, got {shown(value)}") from None
