"""Text in, text out: a checkpoint's decoder and its tokenizer together."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastgpt import checkpoint
from fastgpt.generate import stream
from fastgpt.model import GPT
from fastgpt.text import Decoder, Stops, Tokenizer

Messages = Sequence[dict]  # a chat: see Tokenizer.encode_chat
OWN_EOS = "the tokenizer's"


def pipeline(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Pipeline":
    """Loads a checkpoint to go from text to text.

        pipe = fastgpt.pipeline("path/to/checkpoint")
        print(pipe("Once upon a time", max_new_tokens=50, temperature=0.8))

    Args:
        path: what `GPT.from_pretrained` takes, with a tokenizer.json.
        dtype: of the weights; default as stored.
        device: default a GPU if there is one.

    Raises: FileNotFoundError, ValueError that says what is missing or damaged.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = checkpoint.resolve(path)
    tokenizer = Tokenizer.from_folder(folder)
    return Pipeline(GPT.from_pretrained(folder, dtype=dtype, device=device), tokenizer)


class Pipeline:
    """A decoder and its tokenizer.

    Args of its methods:
        max_new_tokens: of each text.
        stop: a string, or several, before which a text ends; it may be cut into tokens in any way.
        options: those of `generate`, for which there are no other defaults, whatever generation_config.json says; except
            eos, which is by default the tokens that end a text according to the checkpoint. None: none does.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompts: str | Sequence[str], max_new_tokens: int = 256, **options):
        """The text that follows on a prompt, without the prompt; or a list of them for a list of prompts. With num_samples > 1
        each text is a list of texts."""
        single = isinstance(prompts, str)
        if not single and not (isinstance(prompts, Sequence) and all(isinstance(prompt, str) for prompt in prompts)):
            raise TypeError(f"prompts: expected a str or a list of them, got {prompts!r}")
        texts = self._texts([prompts] if single else prompts, max_new_tokens, options)
        return texts[0] if single else texts

    def chat(self, messages: Messages | str, max_new_tokens: int = 256, **options):
        """The answer to messages, each a dict with role and content, or to one of a user; several if num_samples > 1."""
        return self._texts([as_messages(messages)], max_new_tokens, options)[0]

    def stream(self, prompt: str | Messages, max_new_tokens: int = 256, **options) -> Iterator[str]:
        """Yields the text that follows on a prompt or on messages as it comes, in whole characters."""
        if options.get("num_samples", 1) != 1:
            raise ValueError(f"num_samples: expected 1 for a stream, got {options['num_samples']!r}")
        run = self.start([prompt], max_new_tokens, **options)
        return (piece for pieces in run for piece in pieces if piece)

    def start(
        self, prompts: Sequence[str | Messages], max_new_tokens: int = 256,
        *, stop: str | Sequence[str] = (), eos: int | Sequence[int] | None | str = OWN_EOS, **options,
    ) -> "Run":  # fmt: skip
        """What the others do, for those who want to know more than the text."""
        ids = [self.encode(prompt) for prompt in prompts]
        if eos is OWN_EOS:
            eos = [token for token in self.tokenizer.eos if token < self.model.config.vocab_size]
        return Run(self.model, self.tokenizer, ids, max_new_tokens, stop, eos, options)

    def encode(self, prompt: str | Messages) -> list[int]:
        """The ids of a text, or of a chat."""
        if not isinstance(prompt, str):
            return self.tokenizer.encode_chat(prompt)
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        return ids

    def _texts(self, prompts, max_new_tokens, options):
        texts = [row.text for row in self.start(prompts, max_new_tokens, **options).finish()]
        n = options.get("num_samples", 1)
        return texts if n == 1 else [texts[begin : begin + n] for begin in range(0, len(texts), n)]


def as_messages(messages: Messages | str) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


@dataclass
class Row:
    """One text as it is generated.

    tokens: the new ones, the one that ended it included.
    logprobs: theirs, with return_logprobs.
    text: of the new tokens, without what ended it.
    finish_reason: "eos"; "stop", a stop string; "length", max_new_tokens; None as long as it goes on.
    """

    decoder: Decoder
    stops: Stops
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def push(self, token: int, ends: bool) -> str:
        """Takes a token; returns the text that has become certain."""
        self.tokens.append(token)
        if ends:
            return self.finish("eos")
        piece = self.stops.push(self.decoder.push(token))
        self.text += piece
        if self.stops.found:
            self.finish_reason = "stop"
        return piece

    def finish(self, reason: str) -> str:
        """Ends it; returns the rest of the text."""
        piece = self.stops.push(self.decoder.finish())
        self.finish_reason = "stop" if self.stops.found else reason
        piece += self.stops.finish()
        self.text += piece
        return piece


class Run:
    """Texts in the making: iterating gives, for each step, the list of new pieces of text, one for each row.

    rows: the samples of the first prompt, then of the next one.
    prompts: their ids.
    times: when the first step began, and when the tokens of each were known, in seconds.
    """

    def __init__(self, model, tokenizer, prompts: list[list[int]], max_new_tokens: int, stop, eos, options):
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise TypeError(f"stop: expected a string or a list of them, got {stop!r}")
        if not all(stop):
            raise ValueError(f"stop: expected strings that are not empty, got {stop!r}")
        self.prompts, self.eos = prompts, {eos} if isinstance(eos, int) else set(eos or ())
        self.logprobs = options.get("return_logprobs", False)
        self.steps = stream(model, prompts, max_new_tokens, eos=eos, **options)
        samples = options.get("num_samples", 1)
        self.rows = [Row(Decoder(tokenizer, prompt), Stops(stop)) for prompt in prompts for _ in range(samples)]
        self.times = []

    def __iter__(self) -> Iterator[list[str]]:
        self.times = [time.perf_counter()]
        for step in self.steps:
            tokens, *logprobs = [x.tolist() for x in (step if self.logprobs else (step,))]  # waits for the device
            self.times.append(time.perf_counter())
            pieces = [""] * len(tokens)
            for i, row in enumerate(self.rows):
                if row.finish_reason is None:
                    pieces[i] = row.push(tokens[i], tokens[i] in self.eos)
                    row.logprobs += [x[i] for x in logprobs]
            yield pieces
            if all(row.finish_reason for row in self.rows):
                break
        self.steps.close()
        if not all(row.finish_reason for row in self.rows):
            yield ["" if row.finish_reason else row.finish("length") for row in self.rows]

    def finish(self) -> list[Row]:
        """Runs to the end; the rows."""
        for _ in self:
            pass
        return self.rows

    @property
    def prefill_seconds(self) -> float:
        """Until the first new token."""
        return self.times[min(1, len(self.times) - 1)] - self.times[0]

    @property
    def decode_seconds(self) -> float:
        """For the others."""
        return self.times[-1] - self.times[0] - self.prefill_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, all rows together; None where there was nothing to decode."""
        steps = sum(len(row.tokens) - 1 for row in self.rows)
        return steps / self.decode_seconds if len(self.times) > 2 else None
