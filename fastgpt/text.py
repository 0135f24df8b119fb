"""Text to token ids and back: one wrapper around the `tokenizers` library, for character-level and any other model."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

CONTEXT = 16  # tokens of a prompt that decide how the next ones read: with a space before them, say


class Tokenizer:
    """Encodes text to token ids and decodes them, as a `tokenizer.json` describes.

    Args:
        special_tokens: by their names in tokenizer_config.json: bos_token, eos_token, ...
        eos: ids of the tokens that end a text.
        chat_template: in Jinja, how messages become a prompt; None if the model is not made for chats.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer,
        *, special_tokens: dict[str, str] | None = None, eos: Sequence[int] = (), chat_template: str | None = None,
    ):  # fmt: skip
        self.backend, self.special_tokens, self.eos = backend, special_tokens or {}, list(eos)
        self.chat_template = chat_template

    @classmethod
    def from_corpus(cls, text: str) -> "Tokenizer":
        """A character-level tokenizer: one token for each distinct character of `text`, in code-point order."""
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, **options) -> "Tokenizer":
        """Reads a `tokenizer.json`; options: those of the class. Raises FileNotFoundError, ValueError if it is damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: expected the file {path}, which does not exist")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {path} is damaged: {error}") from error
        # How texts were brought to one length when the tokenizer was made is no part of it.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, **options)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder as transformers writes it.

        Beside `tokenizer.json` it may have: `tokenizer_config.json` with special tokens and a chat template, which
        `chat_template.jinja` goes before; `generation_config.json`, or else `config.json`, with eos_token_id. These and the
        eos_token of tokenizer_config.json end a text; ids that the vocabulary lacks are left out.

        Raises: FileNotFoundError, or ValueError that says which file is damaged.
        """
        folder = Path(folder)
        config, generation_config, tokenizer_config = (
            read_json(folder / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
        special_tokens = {}
        for name, token in tokenizer_config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                special_tokens[name] = token
        template = tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        result = cls.load(folder / "tokenizer.json", special_tokens=special_tokens, chat_template=template)

        eos = (generation_config if "eos_token_id" in generation_config else config).get("eos_token_id")
        eos = [*(eos if isinstance(eos, list) else [eos]), result.backend.token_to_id(special_tokens.get("eos_token", ""))]
        known = [token for token in eos if token is not None and result.backend.id_to_token(token) is not None]
        result.eos = list(dict.fromkeys(known))
        return result

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that belong around a text, a bos say, unless special is False.

        Raises ValueError naming the characters that the vocabulary lacks.
        """
        try:
            return self.backend.encode(text, add_special_tokens=special).ids
        except Exception as error:  # a word-level model without an unknown token raises plain Exception
            unknown = sorted(set(text) - self.backend.get_vocab().keys())
            if not unknown:
                raise
            named = ", ".join(repr(character) for character in unknown[:8])
            raise ValueError(
                f"text: expected only the {self.vocab_size} characters that the model was trained on, "
                f"got {named}{' and more' if len(unknown) > 8 else ''}"
            ) from error

    def encode_chat(self, messages: Sequence[dict], *, add_generation_prompt: bool = True, **variables) -> list[int]:
        """The ids of a chat, as the chat template writes it.

        Args:
            messages: each with a role, "system", "user" or "assistant" say, and a content.
            add_generation_prompt: whether the beginning of an answer follows.
            variables: further ones that the template knows.

        Raises: ValueError where there is no template, or it does not accept the messages.
        """
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt, **variables), special=False)

    def chat_text(self, messages: Sequence[dict], **variables) -> str:
        """The text of which `encode_chat` gives the ids."""
        if not isinstance(messages, Sequence) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise TypeError(f"messages: expected a list of dicts with role and content, got {messages!r}")
        if self.chat_template is None:
            raise ValueError("messages: expected a model with a chat template, this one has none")
        return self._chat_template.render(messages, **self.special_tokens | variables)

    @cached_property
    def _chat_template(self):
        from fastgpt.chat import ChatTemplate  # which loads jinja2

        return ChatTemplate(self.chat_template)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int]):
        """Yields text as ids come, each piece as soon as it is whole characters."""
        stream = Decoder(self)
        for token in ids:
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece


class Decoder:
    """The text of tokens that come one by one, in whole characters.

    Args:
        prompt: ids before them, whose text is not given but may decide about the text of the first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        begin = max(len(prompt) - CONTEXT, 0)
        for begin in range(begin, max(begin - 4, -1), -1):  # not amidst a character
            if not tokenizer.decode(prompt[begin:]).startswith("\ufffd"):
                break
        # What was given last, and then the tokens since: together they read as they do in the whole.
        self.window = list(prompt[begin:])
        self._begin_at(len(self.window))

    def _begin_at(self, given: int):
        self.given, self.given_text = given, self.tokenizer.decode(self.window[:given])

    def push(self, token: int) -> str:
        """The characters that are whole with this token."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # The replacement character stands for bytes that may be the beginning of a character.
        if len(text) <= len(self.given_text) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self.given_text) :]
        del self.window[: self.given]
        self._begin_at(len(self.window))
        return piece

    def finish(self) -> str:
        """What is left: characters that stayed incomplete, as the tokenizer decodes them."""
        return self.tokenizer.decode(self.window)[len(self.given_text) :]


class Stops:
    """Cuts a text that comes in pieces before the first stop string that is complete in it.

    What may be the beginning of a stop string is held back. The cut is the same whatever the pieces.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop, self.held, self.found = list(stop), "", False

    def push(self, piece: str) -> str:
        """The text that is certain; nothing more once a stop string is `found`."""
        if not self.stop or self.found:
            return "" if self.found else piece
        text = self.held + piece
        begins = {stop: text.find(stop) for stop in self.stop if stop in text}
        if begins:
            self.found = True
            first = min(begins, key=lambda stop: (begins[stop] + len(stop), begins[stop]))
            return text[: begins[first]]
        held = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
        )
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        return "" if self.found else self.held


def read_json(path: Path) -> dict:
    """A JSON object, empty if there is no such file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is damaged: {error}") from error
    return result
