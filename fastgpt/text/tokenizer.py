"""Text to token ids and back: a wrapper around the `tokenizers` library, for character-level and all other models."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from fastgpt.checks import require_flag, require_integer, require_path, writing
from fastgpt.folders import replacing
from fastgpt.text import vocabularies
from fastgpt.text.streaming import IncrementalDetokenizer
from fastgpt.text.tokenizer_files import add_tokens, read_chat_templates, read_eos_ids, read_special_tokens, shown
from fastgpt.text.vocabularies import find, read_json, read_text

# The library's panics derive from BaseException. So do these, which are not caused by its input.
PASSED_ON = (KeyboardInterrupt, SystemExit, MemoryError)


class Tokenizer:
    """Encodes text to token ids and decodes them, as a `tokenizer.json` describes.

    Args:
        special_tokens: name in tokenizer_config.json, such as "eos_token" -> token.
        eos: ids of the end-of-sequence tokens.
        chat_template: Jinja template that turns messages into a prompt; or several by name, one of them "default"; None if the
            model is not made for chats.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer,
        *, special_tokens: dict[str, str] | None = None, eos: Sequence[int] = (),
        chat_template: str | dict[str, str] | None = None,
    ):  # fmt: skip
        self.backend, self.special_tokens, self.eos = backend, special_tokens or {}, list(eos)
        self.chat_template = chat_template

    @classmethod
    def from_corpus(cls, text: str) -> "Tokenizer":
        """A character-level tokenizer: one token for each distinct character of `text`, in code-point order."""
        require_text(text)
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, **options) -> "Tokenizer":
        """Reads a `tokenizer.json`; options: arguments of the class. Raises FileNotFoundError; ValueError if it is damaged."""
        path = require_path("tokenizer", path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"tokenizer: expected the file {path}, which does not exist")
        content = read_text(path)
        try:
            _require_safe(content)
            backend = tokenizers.Tokenizer.from_str(content)
        except PASSED_ON:
            raise
        except BaseException as error:
            raise ValueError(f"tokenizer: {path} is damaged: {error}") from error
        # Truncation and padding are settings of an earlier call, not properties of the tokenizer.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, **options)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder in the format of transformers.

        The first of these that exists is read: `tokenizer.json`, `tokenizer.model` (of SentencePiece; needs the libraries
        sentencepiece and protobuf), `vocab.json` with `merges.txt`, or `vocab.txt` (WordPiece of BERT). There may also be:

        - `tokenizer_config.json`, which overrides `special_tokens_map.json` and `added_tokens.json`: added tokens, special
          tokens by name, chat templates and, for the older formats, whether a text is encoded with a bos or eos token;
        - `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, which override its chat templates;
        - `generation_config.json`, or else `config.json`, with eos_token_id. These and the eos_token are the end-of-sequence
          tokens; ids that are not in the vocabulary are ignored.

        Raises: FileNotFoundError, or ValueError that says which file is damaged, or which library to install.
        """
        folder = require_path("tokenizer", folder)
        config = read_json(folder, "tokenizer_config.json")
        older: tuple[Callable, Path] | None = None
        eos, special_tokens = read_eos_ids(folder), read_special_tokens(folder, config)
        if (path := find(folder, "tokenizer.json")) is not None:
            backend = cls.load(path).backend
        elif (path := find(folder, "tokenizer.model")) is not None:
            older = vocabularies.sentencepiece, path
        elif find(folder, "vocab.json") is not None and find(folder, "merges.txt") is not None:
            older = vocabularies.byte_level, folder
        elif (path := find(folder, "vocab.txt")) is not None:
            older = vocabularies.wordpiece, path
        else:
            raise FileNotFoundError(
                f"tokenizer: expected the file {folder / 'tokenizer.json'}, which does not exist; nor is there a "
                f"tokenizer.model, a vocab.json with a merges.txt, or a vocab.txt"
            )
        try:
            if older is not None:
                read, path = older
                backend, named = read(path, config)
                special_tokens = named | special_tokens
            add_tokens(backend, folder, config, special_tokens)
            if older is not None:
                vocabularies.add_bos_and_eos(backend, config, special_tokens)
        except (*PASSED_ON, ValueError, OSError):
            raise
        except BaseException as error:
            raise ValueError(f"tokenizer: {folder} is damaged: {error}") from error
        eos = [token for token in eos if token < 2**32 and backend.id_to_token(token) is not None]
        ending = backend.token_to_id(special_tokens.get("eos_token", ""))
        eos = list(dict.fromkeys(eos if ending is None else [*eos, ending]))
        return cls(backend, special_tokens=special_tokens, eos=eos, chat_template=read_chat_templates(folder, config))

    def save(self, path: str | Path) -> None:
        path = require_path("path", path)
        with writing("path", path, "a file"):
            self.backend.save(str(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, and `tokenizer_config.json` with the special tokens and chat templates, into a folder that
        exists. Which tokens end a text is said by the model's files there."""
        folder = require_path("folder", folder)
        config: dict[str, Any] = dict(self.special_tokens)
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.chat_template.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with writing("folder", folder, "a folder"):
            for name, text in (
                ("tokenizer.json", self.backend.to_str()),
                ("tokenizer_config.json", json.dumps(config, indent=2)),
            ):
                with replacing(folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, special: bool = True, name: str = "text") -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds to a text, such as bos, unless special is False.

        Args:
            name: of the argument that the text comes from, for errors.

        Raises: TypeError; ValueError for a lone surrogate, or naming characters that are not in the vocabulary.
        """
        require_flag("special", special)
        try:
            return self.backend.encode(text, add_special_tokens=special).ids
        except PASSED_ON:
            raise
        except BaseException as error:
            require_text(text, name)
            if not isinstance(self.backend.model, tokenizers.models.WordLevel):
                raise ValueError(f"{name}: expected text that the tokenizer accepts; its error: {error}") from error
            unknown = sorted(set(text) - self.backend.get_vocab().keys())
            named = ", ".join(repr(character) for character in unknown[:8])
            raise ValueError(
                f"{name}: expected only the {self.vocab_size} characters that the model was trained on, "
                f"got {named}{' and more' if len(unknown) > 8 else ''}"
            ) from error

    def encode_chat(self, messages: Sequence[Mapping], **options) -> list[int]:
        """The token ids of a chat, formatted by the chat template; options: arguments of `chat_text`."""
        return self.encode(self.chat_text(messages, **options), special=False, name="messages")

    def chat_text(
        self, messages: Sequence[Mapping],
        *, add_generation_prompt: bool | None = None, continue_final_message: bool = False, chat_template: str | None = None,
        tools: Sequence[Mapping] | None = None, documents: Sequence[Mapping] | None = None, **variables,
    ) -> str:  # fmt: skip
        """The text of a chat, the same as from `apply_chat_template` of transformers.

        Args:
            messages: each with a role, such as "system", "user" or "assistant", and a content: a text, or parts such as
                `{"type": "text", "text": "Hi"}`. Entries that are None are ignored.
            add_generation_prompt: whether the header of the assistant's answer follows; default: unless
                continue_final_message.
            continue_final_message: whether the text ends with the last message, for the model to continue it.
            chat_template: the name of one of several templates, or a template to use instead. Default: "tool_use" if it exists
                and tools are given, or else "default".
            tools: JSON schemas of functions that the model may call.
            documents: documents for the template.
            variables: further variables of the template, such as enable_thinking.

        Raises: TypeError; ValueError if there is no template; `fastgpt.text.chat_template.ChatTemplateError`, a ValueError,
            if the template rejects the messages or exceeds its limits of work and size.
        """
        require_flag("continue_final_message", continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        require_flag("add_generation_prompt", add_generation_prompt)
        if continue_final_message and add_generation_prompt:
            raise ValueError("add_generation_prompt: expected False with continue_final_message, got True")
        given: dict[str, Any] = {"tools": tools, "documents": documents}
        for name, value in given.items():
            if value is not None and not _is_list_of(Mapping, value):
                raise TypeError(f"{name}: expected a list of dicts or None, got {shown(value)}")
        template = self._template(chat_template, tools)
        given |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        text = template.render(messages, **self.special_tokens | variables | given)
        if not messages:
            raise ValueError("messages: expected at least one, got an empty chat")
        require_text(text, "messages")
        return text

    def unread_variables(self, variables: Mapping[str, Any]) -> list[str]:
        """The names of those variables of `chat_text` that the chat template does not read, so that they change nothing."""
        template = self._template(variables.get("chat_template"), variables.get("tools"))
        own = {"add_generation_prompt", "continue_final_message", "chat_template"}
        return [name for name in variables if name not in own | template.variables]

    def _template(self, chosen: str | None, tools):
        """The compiled template of this name or source; by default, the default one."""
        from fastgpt.text.chat_template import ChatTemplate  # which loads jinja2

        several = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if chosen is None:
            source = several.get("tool_use" if tools is not None and "tool_use" in several else "default")
            if source is None and isinstance(self.chat_template, dict):
                raise ValueError(f"chat_template: expected one of {', '.join(map(repr, several))}, got None")
        else:
            source = several.get(chosen, chosen) if isinstance(chosen, str) else chosen
        if source is None:
            raise ValueError("messages: expected a model with a chat template, this one has none")
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source)
        return self._compiled[source]

    @cached_property
    def _compiled(self) -> dict:
        """Compiled templates by source."""
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens. Ids without a token, such as those that pad a model's vocabulary, have
        no text. Raises TypeError, ValueError for anything that is not an id."""
        if not isinstance(ids, Iterable):
            raise TypeError(f"ids: expected an iterable of token ids, got {ids!r}")
        ids = list(ids)
        try:
            return self.backend.decode(ids, skip_special_tokens=True)
        except PASSED_ON:
            raise
        except BaseException as error:
            for token in ids:
                require_integer("ids", token, 0, 2**32 - 1)
            raise ValueError(f"ids: expected token ids that the tokenizer accepts; its error: {error}") from error

    def special_texts(self) -> dict[int, str]:
        """Special tokens, which `decode` skips: id -> text."""
        return {index: token.content for index, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decodes a stream of ids: yields each piece of text as soon as its characters are complete."""
        stream = IncrementalDetokenizer(self)
        for token in ids:
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece


def require_text(value: Any, name: str = "text") -> None:
    """Raises TypeError for anything but a str, and ValueError for a lone surrogate, which UTF-8 cannot encode."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected characters, got the lone surrogate {value[error.start]!r} at position {error.start}"
        ) from error


def _require_safe(content: str) -> None:
    """Raises an error for an invalid regular expression or prefix in a tokenizer.json, where the library would crash.

    Its own error message can split a character, which aborts the process (tokenizers 0.23): for a regular expression that is
    not ASCII, and for the second token of a merge, from which it removes as many bytes as continuing_subword_prefix has.
    """
    for match in re.finditer(r'"continuing_subword_prefix"\s*:\s*("(?:[^"\\]|\\.)+")', content):
        prefix = json.loads(match[1])
        model = json.loads(content).get("model")
        merges = model.get("merges") if isinstance(model, dict) and model.get("type") != "WordPiece" else None
        for pair in merges if isinstance(merges, list) else []:
            second = pair.partition(" ")[2] if isinstance(pair, str) else pair[-1] if isinstance(pair, list) and pair else ""
            if not isinstance(second, str) or not second.startswith(prefix):
                raise ValueError(f"expected merges whose second token begins with {prefix!r}, got {pair!r}")
    for match in re.finditer(r'"Regex"\s*:\s*"((?:[^"\\]|\\.)*)"', content):
        pattern = json.loads(f'"{match[1]}"')
        tokenizers.Regex("".join(c if c.isascii() else f"\\x{{{ord(c):x}}}" for c in pattern))


def _is_list_of(kind: type, value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(entry, kind) for entry in value)
