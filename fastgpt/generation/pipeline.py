"""Text in, text out: the decoder or encoder-decoder of a checkpoint and its tokenizer."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoints import gguf_file, hub, transformers_format
from fastgpt.checkpoints.files import naming
from fastgpt.checks import listed, make_list, require_integer, shown
from fastgpt.folders import SHIPPED_MODEL
from fastgpt.generation.config import GenerationConfig, defaults_of, integers
from fastgpt.generation.conversation import OWN_EOS, Conversation, require_template_variables, warn_of_unread
from fastgpt.generation.many import Interrupted, Many, is_many
from fastgpt.generation.request import Kept, Request
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_decoder import EncoderDecoder
from fastgpt.model.inputs import require_room
from fastgpt.ops.quantized_weight import Quantization
from fastgpt.text.streaming import IncrementalDetokenizer, StopStrings
from fastgpt.text.tokenizer import Tokenizer, require_text

Messages = Sequence[dict]  # a chat: see Tokenizer.encode_chat
Stop = str | int | Sequence  # see Pipeline


def pipeline(
    path: str | Path = SHIPPED_MODEL,
    *, revision: str | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    weights: str | Quantization | None = None, lora: str | Path | None = None, decoder_only: bool = False,
) -> "Pipeline":  # fmt: skip
    """Loads a checkpoint to go from text to text.

        pipe = fastgpt.pipeline("path/to/checkpoint")
        print(pipe("Once upon a time", max_new_tokens=50, temperature=0.8))

    Args:
        path: what `GPT.from_pretrained` or `EncoderDecoder.from_pretrained` takes, with the files of a tokenizer: see `Tokenizer.from_folder`; a GGUF file has its
            own. Default: the character-level model of Shakespeare that comes with the package.
        revision: of a model on the Hugging Face Hub: a branch, a tag or a commit; default its main branch.
        dtype: of the weights; default as stored.
        device: default a GPU if there is one.
        weights: None, "int8", "int4", a `Quantization` or "dequantized", as in `GPT.from_pretrained`.
        lora: as in `GPT.from_pretrained`; None for an encoder-decoder.
        decoder_only: whether an encoder-decoder is refused.

    Raises: FileNotFoundError, ValueError that says what is missing or damaged.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if gguf_file.is_gguf(path):
        from fastgpt.text.gguf_tokenizer import tokenizer_from_gguf

        hub.require_no_revision(path, revision)
        file = gguf_file.read(path)
        with naming(file.path):
            tokenizer = tokenizer_from_gguf(file.metadata)
        return Pipeline(GPT.from_pretrained(path, dtype=dtype, device=device, weights=weights, lora=lora), tokenizer)
    folder = hub.resolve(path, revision)
    family, _, _ = transformers_format.read_config(folder)  # a folder that is no checkpoint is not one that lacks a tokenizer
    if family.stacks and decoder_only:
        raise ValueError(f"model: expected a decoder, got an encoder-decoder in {folder}, which `fastgpt generate` takes")
    tokenizer = Tokenizer.from_folder(folder)
    if family.stacks:
        if lora is not None:
            raise ValueError(f"lora: expected None for an encoder-decoder, got {shown(lora)}")
        return Pipeline(EncoderDecoder.from_pretrained(folder, dtype=dtype, device=device, weights=weights), tokenizer)
    return Pipeline(GPT.from_pretrained(folder, dtype=dtype, device=device, weights=weights, lora=lora), tokenizer)


class Pipeline:
    """A decoder and its tokenizer; or an encoder-decoder, which does not continue a prompt, but reads it, and writes a text of its
    own.

    Args of its methods:
        max_new_tokens: for each text. None: the default of the checkpoint's generation_config.json, or else 300; but no more
            than the context has room for after the longest prompt. A list has a number for each prompt: see max_batch in
            `GenerationConfig`.
        stop: a string, or several, before which a text ends, however it is split into tokens; it may contain special tokens.
            A list may also contain token ids. A list of lists has one for each prompt.
        template_variables: variables of the chat template besides the messages, by name: those of `Tokenizer.chat_text`, such
            as tools, and others of the model, such as `{"enable_thinking": False}`.
        options: those of `generate`, see `fastgpt.generation.config.GenerationConfig`. An option that is passed wins, then the
            default in the checkpoint's generation_config.json, then the default there. Of eos, the default is all tokens that
            end a text according to the checkpoint, those of its tokenizer included; with None, there is none.
    """

    def __init__(self, model: GPT | EncoderDecoder, tokenizer: Tokenizer):
        self.model: Any = model
        self.tokenizer = tokenizer

    def __call__(
        self,
        prompts: str | Iterable[str],
        max_new_tokens: int | Sequence[int] | None = None,
        *,
        progress: bool = False,
        **options,
    ) -> str | list[str] | list[list[str]]:
        """The continuation of a prompt, without the prompt; for a list or an iterator of prompts, a list of them. With
        num_samples > 1 each is a list of texts.

        Thousands of prompts may be given with max_batch, and `progress` shows a bar on standard error; Ctrl-C then raises
        `fastgpt.Interrupted`, a KeyboardInterrupt whose `results` are the texts, None for those that are not done."""
        single, several = isinstance(prompts, str), listed(prompts)
        if not single and not (isinstance(several, Sequence) and all(isinstance(prompt, str) for prompt in several)):
            raise TypeError(f"prompts: expected a str or a list of them, got {shown(several)}{make_list('prompts', several)}")
        texts = self._texts([prompts] if single else several, max_new_tokens, options, progress)
        return texts[0] if single else texts

    def embed(self, *arguments: Any, **options: Any) -> Any:
        """Raises TypeError: a decoder continues texts; an encoder has `embed` and `fill`."""
        raise TypeError(
            f"pipe: expected an encoder, which embeds texts and fills masks, got a decoder, "
            f"{self.model.checkpoint_config.get('model_type', 'a GPT')!r}: pipe(prompts) continues texts"
        )

    fill = embed

    def chat(self, messages: Messages | str, max_new_tokens: int | None = None, **options) -> str | list[str]:
        """The answer to messages, each a dict with role and content, or to a user's message as a str; a list of answers if
        num_samples > 1."""
        return self._texts([as_messages(messages)], max_new_tokens, options)[0]

    def stream(self, prompt: str | Messages, max_new_tokens: int | None = None, **options) -> Iterator[str]:
        """Yields the continuation of a prompt, or the answer to messages, as it is generated, in whole characters."""
        if options.get("num_samples", 1) != 1:
            raise ValueError(f"num_samples: expected 1 for a stream, got {shown(options['num_samples'])}")
        run = self._text_run([prompt], max_new_tokens, options)
        if isinstance(run, ManyRun):
            raise ValueError("max_batch, max_new_tokens: expected None and an integer for a stream, got those of many prompts")
        return (piece for pieces in run for piece in pieces if piece)

    def start(
        self, prompts: Iterable[str | Messages], max_new_tokens: int | Sequence[int] | None = None,
        *, stop: Stop = (), eos: int | Sequence[int] | None | str = OWN_EOS, template_variables: dict | None = None, **options,
    ) -> "Run | ManyRun":  # fmt: skip
        """Starts a generation and returns it as a `Run`, which has tokens, log-probabilities and times besides the texts; as a
        `ManyRun` with max_batch."""
        prompts = listed(prompts)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts: expected a list of them, got {shown(prompts)}{make_list('prompts', prompts)}")
        if not prompts:
            raise ValueError("prompts: expected at least one, got none")
        ids = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids.append(self.encode(prompt, template_variables))
            except ValueError as error:
                raise type(error)(f"{error}{f' (prompt {number} of {len(prompts)})' * (len(prompts) > 1)}") from error
        return self.run(ids, max_new_tokens, stop, eos, options)

    def run(
        self, prompts: list[list[int]], max_new_tokens: int | Sequence[int] | None, stop: Stop,
        eos: int | Sequence[int] | None | str, options: dict, kept: Kept | None = None,
    ) -> Any:  # fmt: skip
        """`start` for prompts that are token ids. kept: the cache of a conversation, which has the first of them."""
        if eos is OWN_EOS:
            own = [token for token in self.tokenizer.eos if token < self.model.config.vocab_size]
            eos = list(dict.fromkeys([*defaults_of(self.model).get("eos", ()), *own]))
        config = GenerationConfig.of(self.model, options | {"eos": eos})
        if kept is None and is_many(self.model, prompts, max_new_tokens, config):
            return ManyRun(self.model, self.tokenizer, prompts, max_new_tokens, stop, config)
        return Run(self.model, self.tokenizer, prompts, max_new_tokens, stop, config, kept)

    def conversation(self, system: str | None = None, **options) -> Conversation:
        """A conversation with the model, whose cache is kept from one turn to the next.

            chat = pipe.conversation("You are brief.")
            print(chat.say("Name a river."))
            for piece in chat.stream("And a longer one?"):
                print(piece, end="")

        Args:
            system: the text of a system message.
            options: those of `start`, for all turns; `Conversation` says which it lacks.

        Raises: ValueError if the model has no chat template.
        """
        return Conversation(self, system, **options)

    def encode(self, prompt: str | Messages, template_variables: dict | None = None) -> list[int]:
        """The token ids of a text or a chat.

        Raises: TypeError, ValueError; `fastgpt.model.inputs.PromptTooLong`, a ValueError, for more tokens than the context.
        """
        if isinstance(prompt, str):
            if template_variables is not None:
                raise ValueError("template_variables: expected none with a prompt that is not a chat")
            name, ids = "prompt", self.tokenizer.encode(prompt, name="prompt")
        else:
            require_template_variables(template_variables)
            warn_of_unread(template_variables, self.tokenizer)
            name, ids = "messages", self.tokenizer.encode_chat(prompt, **template_variables or {})
        if not ids:
            raise ValueError(f"{name}: expected at least one token, got an empty prompt")
        require_room(name, len(ids), self.model.config)
        if max(ids) >= (size := self.model.config.vocab_size):
            token = self.tokenizer.backend.id_to_token(max(ids))
            raise ValueError(f"{name}: expected tokens of the model, which has {size}, got {shown(token)} with id {max(ids)}")
        return ids

    def _text_run(self, prompts: Sequence, max_new_tokens: int | Sequence[int] | None, options: dict) -> "Run | ManyRun":
        """A run of which only the texts are returned."""
        run = self.start(prompts, max_new_tokens, **options)
        if run.options.return_logprobs:
            raise ValueError(
                "return_logprobs: expected False where the text is all that is returned, got True; the rows of "
                "pipe.start([prompt], return_logprobs=True).finish() have logprobs"
            )
        return run

    def _texts(
        self, prompts: Sequence, max_new_tokens: int | Sequence[int] | None, options: dict, progress: bool = False
    ) -> list:
        run = self._text_run(prompts, max_new_tokens, options)
        n = run.options.num_samples

        def texts(rows: Sequence[Row | None]) -> list:
            texts = [None if row is None else row.text for row in rows]
            return texts if n == 1 else [texts[begin : begin + n] for begin in range(0, len(texts), n)]

        try:
            return texts(run.finish(progress))
        except Interrupted as interrupted:
            interrupted.results = texts(interrupted.results)
            raise


def as_messages(messages: Messages | str) -> Messages:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def split_stop(stop: Stop, vocab_size: int) -> tuple[list[str], frozenset[int]]:
    """The stop strings, and the ids of tokens to stop at."""
    entries = [stop] if isinstance(stop, str) else stop if isinstance(stop, Sequence) else [None]
    strings = [entry for entry in entries if isinstance(entry, str)]
    ids = [entry for entry in entries if not isinstance(entry, (str, bool)) and hasattr(entry, "__index__")]
    if len(strings) + len(ids) < len(entries):
        raise TypeError(f"stop: expected a string or a list of them, got {shown(stop)}; ids of tokens may be in a list, too")
    if not all(strings):
        raise ValueError(f"stop: expected strings that are not empty, got {shown(stop)}")
    for text in strings:
        require_text(text, "stop")
    return strings, frozenset(require_integer("stop", token, 0, vocab_size - 1) for token in ids)


@dataclass
class Row:
    """One text as it is generated.

    tokens: the new ones, the one that ended it included.
    logprobs: theirs, with return_logprobs.
    stop_ids: of tokens that end it.
    special_texts: tokens that are no text, but may be part of a stop string.
    text: of the new tokens, without what ended it.
    finish_reason: "eos"; "stop", a stop string; "length", max_new_tokens; None as long as it goes on.
    """

    decoder: IncrementalDetokenizer
    stops: StopStrings
    stop_ids: frozenset[int] = frozenset()
    special_texts: dict[int, str] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def push(self, token: int, ends: bool) -> str:
        """Takes a token; returns the text that has become certain."""
        self.tokens.append(token)
        if ends:
            return self.finish("eos")
        if token in self.stop_ids:
            return self.finish("stop")
        piece = self.stops.push(self.decoder.push(token))
        if token in self.special_texts:
            piece += self.stops.push(self.special_texts[token], is_text=False)
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


def new_rows(tokenizer: Tokenizer, prompts: list[list[int]], stop: Stop, samples: int, vocab_size: int) -> list[Row]:
    """The rows of a generation: the samples of the first prompt, then of the next one."""
    several = stop if isinstance(stop, Sequence) and any(isinstance(entry, (list, tuple)) for entry in stop) else None
    if several is not None and len(several) != len(prompts):
        raise ValueError(f"stop: expected a list for each of {len(prompts)} prompts, got {len(several)}")
    stops = [split_stop(entry, vocab_size) for entry in several] if several else [split_stop(stop, vocab_size)] * len(prompts)
    special_texts = tokenizer.special_texts() if any(strings for strings, _ in stops) else {}
    return [
        Row(IncrementalDetokenizer(tokenizer, prompt), StopStrings(strings), ids, special_texts)
        for prompt, (strings, ids) in zip(prompts, stops)
        for _ in range(samples)
    ]


class Run:
    """A generation in progress: iterating yields, for each step, the list of new pieces of text, one for each row.

    rows: the samples of the first prompt, then of the next one.
    prompts: their ids.
    continues: whether a text continues its prompt; False of an encoder-decoder's.
    options: of the generation, defaults of the checkpoint included.
    times: when the first step began, and when the tokens of each were known, in seconds.
    """

    def __init__(
        self, model: GPT | EncoderDecoder, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: Any, stop: Stop,
        options: GenerationConfig, kept: Kept | None = None,
    ):  # fmt: skip
        request = Request.of(model, prompts, max_new_tokens, options, kept=kept)
        self.prompts, self.options, self.steps = prompts, request.options, request.stream()
        self.request, self.eos = request, set(request.eos)
        self.continues = request.model is model
        before = prompts if self.continues else [[] for _ in prompts]
        self.rows = new_rows(tokenizer, before, stop, self.options.num_samples, model.config.vocab_size)
        self.times: list[float] = []

    def __iter__(self) -> Iterator[list[str]]:
        self.times = [time.perf_counter()]
        for step in self.steps:
            known = step if self.options.return_logprobs else (step,)
            tokens, *logprobs = [x.tolist() for x in known]  # waits for the device
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
        if self.times[1:]:
            self.request.sampler.require_finite(range(len(self.times) - 1))  # of a GPU's last steps it may not be known yet
        if not all(row.finish_reason for row in self.rows):
            yield ["" if row.finish_reason else row.finish("length") for row in self.rows]

    def finish(self, progress: bool = False) -> list[Row]:
        """Runs to the end; the rows. progress: of `ManyRun.finish`; here rows end together."""
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
        return steps / self.decode_seconds if len(self.times) > 2 and self.decode_seconds > 0 else None

    @property
    def tokens_per_pass(self) -> float | None:
        """New tokens of a row from one pass over the weights, on average, without the first token: 1 without speculation; None
        where there was nothing to decode."""
        if self.request.speculates:
            return self.request.sampler.tokens_per_pass
        return 1.0 if len(self.times) > 2 else None


class ManyRun:
    """A generation of many prompts, whose rows join and leave a batch; `finish` runs it.

    rows, prompts, options: as of `Run`.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int | Sequence[int] | None, stop: Stop,
        options: GenerationConfig,
    ):  # fmt: skip
        self.prompts, self.options, self.seconds = prompts, options, 0.0
        eos = set(integers("eos", options.eos or ()))

        def ends(answer, token):
            row = self.rows[answer.index]
            row.push(token, token in eos)
            row.logprobs += answer.logprobs[-1:]
            return row.finish_reason is not None

        self.many = Many(model, prompts, max_new_tokens, options, ends=ends)  # first: it knows how many rows are too many
        self.rows = new_rows(tokenizer, prompts, stop, options.num_samples, model.config.vocab_size)

    def finish(self, progress: bool = False) -> list[Row]:
        """Runs to the end; the rows.

        Args:
            progress: whether to show a progress bar on standard error.

        Raises: Interrupted on Ctrl-C, with the rows that are done, and None for others. In `rows` they have the text so far.
        """
        begin = time.perf_counter()
        try:
            for answer in self.many.run(progress):
                row = self.rows[answer.index]
                if row.finish_reason is None:
                    row.finish("length")
        except KeyboardInterrupt:
            raise Interrupted([row if row.finish_reason else None for row in self.rows]) from None
        finally:
            self.seconds += time.perf_counter() - begin
        return self.rows

    continues = True
    prefill_seconds = None  # reading and decoding take turns
    tokens_per_pass = None

    @property
    def decode_seconds(self) -> float:
        """For all, reading prompts included."""
        return self.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens of all rows in a second."""
        return sum(len(row.tokens) for row in self.rows) / self.seconds if self.seconds else None
