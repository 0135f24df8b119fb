"""Conversations: turns of a chat over one cache, of which each turn reads only what is new."""

import json
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from fastgpt.cache.contiguous import ContiguousCache
from fastgpt.checks import require_integer, require_path, shown, writing
from fastgpt.folders import replacing
from fastgpt.generation.config import GenerationConfig, defaults_of
from fastgpt.generation.request import Kept
from fastgpt.model.inputs import PromptTooLong
from fastgpt.text.tokenizer import require_text

OWN_EOS = "the checkpoint's"
MAX_NEW_TOKENS = 1024  # of an answer, where neither the caller nor the checkpoint says how many
LEAST_CAPACITY = 1024  # tokens of a cache, which grows to twice as many


class Conversation:
    """A conversation with a chat model: `say` and `stream` take what the user says, and return or yield the answer.

    Keys and values of earlier turns stay in the cache, and the tokens of an answer are those that were generated, so a turn reads
    what the user says and no more, unless the chat template changes earlier messages. Where the context is full, the oldest turns
    are dropped; then the rest is read again.

    Args:
        pipe: a `Pipeline` whose tokenizer has a chat template.
        system: the text of a system message, which is never dropped.
        max_new_tokens: the most tokens of an answer; default: the checkpoint's, or else 1,024. Turns are dropped so that it has
            room for them, or for a quarter of the context if they are more.
        stop, eos, template_variables, options: those of `Pipeline.start`, for all turns; not num_samples, use_cache, max_batch and
            return_logprobs. A seed is that of every turn.

    messages: those of the conversation, each a dict with role and content; without the ones that were dropped.
    dropped: the number of messages that the last turn dropped.
    read: the number of tokens that the last turn read before its answer.
    tokens: those of the last answer.
    tokens_per_second, tokens_per_pass: of the last answer; None if it was too short to tell.
    finish_reason: why it ended: "eos", "stop", "length", or "stopped" by `stop`.

    Raises: TypeError, ValueError, naming the argument.
    """

    def __init__(
        self, pipe: Any, system: str | None = None, *, max_new_tokens: int | None = None, stop: Any = (), eos: Any = OWN_EOS,
        template_variables: dict | None = None, **options,
    ):  # fmt: skip
        if pipe.tokenizer.chat_template is None:
            raise ValueError(
                "pipe: expected a model with a chat template, this one has none: choose one that is made for chats"
            )
        if system is not None:
            require_text(system, "system")
        for name, only in (("num_samples", 1), ("use_cache", True), ("return_logprobs", False), ("max_batch", None)):
            if options.get(name, only) != only:
                raise ValueError(f"{name}: expected {only} in a conversation, got {shown(options[name])}")
        require_template_variables(template_variables)
        warn_of_unread(template_variables, pipe.tokenizer)
        given = require_integer("max_new_tokens", max_new_tokens, 1, optional=True)
        pipe.run([[0]], 1, stop, eos, options)  # not begun: so that errors come now, and not at the first turn
        self.pipe, self.options, self.template_variables = pipe, options, template_variables
        self.max_new_tokens = given or defaults_of(pipe.model).get("max_new_tokens", MAX_NEW_TOKENS)
        self.stop_strings, self.eos = stop, eos
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.dropped, self.read = 0, 0
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.tokens_per_second: float | None = None
        self.tokens_per_pass: float | None = None
        self._answer: Callable[[], Generator | None] = lambda: None  # the last one, as long as somebody holds it
        self._first = len(self.messages)  # those before are not dropped
        self._forget()

    def _forget(self) -> None:
        """Lets go of the cache."""
        self._kept: Kept | None = None
        self._held: list[int] = []  # the tokens in the cache, if it has so many
        # Texts up to the end of each answer, and their tokens as they were generated; encoded again, they might be others.
        self._known: list[tuple[str, list[int]]] = []
        self._stopping = False

    def say(self, text: str) -> str:
        """The answer to what the user says."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Yields the answer to what the user says, as it is generated, in whole characters. What was yielded is the answer, also
        if the caller does not wait for the end: the next turn, `undo`, `reset` and `save` end it."""
        require_text(text, "text")
        self._end_answer()
        self._stopping = False
        self._drop_unanswered()
        self.messages.append({"role": "user", "content": text})
        try:
            ids, prompt = self._fitted()
            new = min(self.max_new_tokens, self._room_after(ids))
            run = self.pipe.run([ids], new, self.stop_strings, self.eos, self.options, self._cache(ids, new))
        except BaseException:
            self.messages.pop()
            raise
        answer = self._stream(run, ids, prompt)
        self._answer = weakref.ref(answer)
        return answer

    def _drop_unanswered(self) -> None:
        """Drops a message whose answer nobody began to read."""
        if self.messages[self._first :] and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _end_answer(self) -> None:
        """Ends the answer that somebody has begun to read."""
        if (answer := self._answer()) is not None:
            answer.close()

    def _stream(self, run: Any, ids: list[int], prompt: str) -> Generator[str, None, None]:
        row = run.rows[0]
        try:
            for (piece,) in run:
                if piece:
                    yield piece
                if self._stopping:
                    break
        except GeneratorExit:
            self._end(run, ids, prompt)
            raise
        except BaseException:  # in the middle of a step: what the cache holds is not known
            self._forget()
            self.messages.append({"role": "assistant", "content": row.text})
            raise
        self._end(run, ids, prompt)

    def _end(self, run: Any, ids: list[int], prompt: str) -> None:
        """Takes the answer of a run, as far as it came."""
        run.steps.close()
        (row,) = run.rows
        self.messages.append({"role": "assistant", "content": row.text})
        self.tokens, self.finish_reason = row.tokens, row.finish_reason or "stopped"
        self.tokens_per_second, self.tokens_per_pass = run.tokens_per_second, run.tokens_per_pass
        text = row.tokens[: len(row.tokens) - (row.finish_reason == "eos")]
        self._held = ids + text
        self._known = [(known, tokens) for known, tokens in self._known if prompt.startswith(known)]
        if row.finish_reason in ("eos", "length"):  # or else it may have tokens that are not in the message
            self._known.append((prompt + row.text, self._held))

    def stop(self) -> None:
        """Ends the answer that is being generated after its current step; may be called from a signal handler."""
        self._stopping = True

    def undo(self) -> bool:
        """Takes back the last turn: what the user said and the answer. Returns False if there is none."""
        self._end_answer()
        if len(self.messages) <= self._first:
            return False
        while len(self.messages) > self._first and self.messages.pop()["role"] != "user":
            pass
        return True

    def reset(self) -> None:
        """Forgets all turns."""
        self._end_answer()
        del self.messages[self._first :]

    def save(self, path: str | Path) -> None:
        """Writes the messages to a file, as JSON; one that is there is replaced when all is written. Raises OSError, naming the
        argument."""
        path = require_path("path", path)
        self._end_answer()
        self._drop_unanswered()
        with writing("path", path, "a file"), replacing(path) as temporary:
            temporary.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Takes the messages of a file that `save` has written in place of those of this conversation, the system message
        included. Raises OSError, ValueError, naming the argument, before anything changes."""
        path = require_path("path", path)
        try:
            messages = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise type(error)(f"path: expected a file of messages, {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"path: expected messages as JSON, {path} is none: {error}") from error
        require_messages(messages)
        self._end_answer()
        self.messages[:] = messages
        self._first = int(bool(messages) and messages[0]["role"] == "system")

    @property
    def _room(self) -> int:
        """The tokens of the context that are left to an answer, if that takes no more than dropping turns."""
        return min(self.max_new_tokens, max(self.pipe.model.config.context_length // 4, 1))

    def _room_after(self, ids: list[int]) -> int:
        return self.pipe.model.config.context_length - len(ids)

    def _fitted(self) -> tuple[list[int], str]:
        """The token ids of the messages, and their text, after the oldest ones have been dropped if there are too many."""
        messages = list(self.messages)
        while True:
            ids, text = self._encoded(messages)
            if self._room_after(ids) >= self._room:
                break
            turns = [i for i in range(self._first, len(messages)) if messages[i]["role"] == "user"]
            if len(turns) < 2:  # there is only this one
                if self._room_after(ids) > 0:
                    break
                raise PromptTooLong(
                    f"text: expected fewer than {self.pipe.model.config.context_length} tokens with the system message, which are "
                    f"the model's context, got {len(ids)}"
                )
            del messages[self._first : turns[1]]
        self.dropped = len(self.messages) - len(messages)
        self.messages[:] = messages
        return ids, text

    def _encoded(self, messages: list[dict]) -> tuple[list[int], str]:
        """Token ids and text of messages. Those up to the last answer are the ones that were generated, if the text begins with
        it."""
        tokenizer = self.pipe.tokenizer
        text = tokenizer.chat_text(messages, **self.template_variables or {})
        for known, ids in reversed(self._known):
            if text.startswith(known):
                rest = text[len(known) :]
                return ids + (tokenizer.encode(rest, special=False, name="text") if rest else []), text
        return tokenizer.encode(text, special=False, name="messages"), text

    def _cache(self, ids: list[int], new: int) -> Kept:
        """The cache with as many of these tokens as it has already, and room for the rest and the answer."""
        model, capacity = self.pipe.model, len(ids) + new
        if self._kept is not None and (self._kept.cache.dtype, self._kept.cache.lengths.device) != (
            GenerationConfig.of(model, self.options).cache_dtype or model.key_dtype,
            model.first_weight.device,
        ):  # the model was cast or moved
            self._forget()
        if self._kept is None:
            config = GenerationConfig.of(model, self.options)
            most = model.config.context_length
            if config.cache == "contiguous":
                most = min(most, max(LEAST_CAPACITY, capacity))
            window = None if config.window is None else min(config.window, model.config.context_length)
            self._kept = Kept(
                model.new_cache(
                    1, most, kind=config.cache, cache_dtype=config.cache_dtype, window=window, page_size=config.page_size
                )
            )
        cache = self._kept.cache
        held = self._held[: cache.counts[0]]
        same = next((i for i, pair in enumerate(zip(held, ids[:-1])) if pair[0] != pair[1]), min(len(held), len(ids) - 1))
        if model.rope_factors_change(max(same, 1), len(ids)):
            same = 0  # all keys are rotated by other factors
        if same < cache.counts[0]:
            try:
                cache.truncate([same])
            except ValueError:  # a ring buffer has overwritten older tokens
                same = 0
                cache.truncate([0])
        self.read = len(ids) - same
        if cache.capacity is not None and cache.capacity < capacity:
            assert isinstance(cache, ContiguousCache)
            cache.grow(min(max(2 * cache.capacity, capacity), model.config.context_length))
            self._kept.recordings.clear()
        return self._kept


def require_messages(messages: Any) -> None:
    """Raises ValueError unless these are the messages of a conversation: a system message or none, then the user's and the
    answers by turns, each a dict of role and content."""
    if not isinstance(messages, list):
        raise ValueError(f"path: expected a list of messages, got a {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ValueError(f"path: expected messages of a role and a text as content, got {shown(message)} as message {i}")
        require_text(message["content"], "path")
        turn = i - (messages[0]["role"] == "system")
        role = "system" if turn < 0 else ("user", "assistant")[turn % 2]
        if message["role"] != role:
            raise ValueError(f"path: expected the role {role} in message {i}, got {shown(message['role'])}")
    if messages and messages[-1]["role"] == "user":
        raise ValueError("path: expected an answer to the last message, got none")


def warn_of_unread(variables: dict | None, tokenizer: Any) -> None:
    """Warns of variables that the chat template does not read."""
    for name in tokenizer.unread_variables(variables) if variables else ():
        warnings.warn(
            f"template_variables: the model's chat template reads none named {name!r}, which changes nothing", stacklevel=4
        )


def require_template_variables(variables: Any) -> None:
    """Raises TypeError, ValueError unless these are variables of a chat template besides the messages, or None."""
    if not (variables is None or isinstance(variables, dict)):
        raise TypeError(f"template_variables: expected a dict, got {shown(variables)}")
    for name in variables or ():
        if not isinstance(name, str):
            raise TypeError(f"template_variables: expected names that are strings, got {shown(name)}")
        if name in ("messages", "self"):
            raise ValueError(f"template_variables: expected none named {name}, which the template has already")
