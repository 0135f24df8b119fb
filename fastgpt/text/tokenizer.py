"""Text to token ids and back: one wrapper around the `tokenizers` library, for character-level and any other model."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from fastgpt.checks import require_flag, require_integer, require_path, writing
from fastgpt.text import vocabularies
from fastgpt.text.vocabularies import find, read_json, read_text

CONTEXT = 16  # tokens of a prompt that decide how the next ones read: with a space before them, say
# The library's panics are no Exception; these are none either, and are no faults of what it was given.
PASSED_ON = (KeyboardInterrupt, SystemExit, MemoryError)


class Tokenizer:
    """Encodes text to token ids and decodes them, as a `tokenizer.json` describes.

    Args:
        special_tokens: by their names in tokenizer_config.json: bos_token, eos_token, ...
        eos: ids of the tokens that end a text.
        chat_template: in Jinja, how messages become a prompt; several by name, of which one is "default"; None if the model
            is not made for chats.
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
        """Reads a `tokenizer.json`; options: those of the class. Raises FileNotFoundError, ValueError if it is damaged."""
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
        # How texts were brought to one length when the tokenizer was made is no part of it.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, **options)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder as transformers writes it.

        Read is the first that is there of `tokenizer.json`, `tokenizer.model` (SentencePiece's; needs the libraries
        sentencepiece and protobuf), and `vocab.json` with `merges.txt`. Beside it there may be:

        - `tokenizer_config.json`, and before it `special_tokens_map.json` and `added_tokens.json`: tokens to add, special
          tokens by name, chat templates, for the older formats whether a bos or an eos belongs around a text;
        - `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, which go before its chat templates;
        - `generation_config.json`, or else `config.json`, with eos_token_id. These and the eos_token end a text; ids that
          the vocabulary lacks are left out.

        Raises: FileNotFoundError, or ValueError that says which file is damaged, or which library to install.
        """
        folder = require_path("tokenizer", folder)
        config = read_json(folder, "tokenizer_config.json")
        older, eos, special_tokens = None, _eos_ids(folder), _special_tokens(folder, config)
        if (path := find(folder, "tokenizer.json")) is not None:
            backend = cls.load(path).backend
        elif (path := find(folder, "tokenizer.model")) is not None:
            older = vocabularies.sentencepiece, path
        elif find(folder, "vocab.json") is not None and find(folder, "merges.txt") is not None:
            older = vocabularies.byte_level, folder
        else:
            raise FileNotFoundError(
                f"tokenizer: expected the file {folder / 'tokenizer.json'}, which does not exist; nor is there a "
                f"tokenizer.model, or a vocab.json with a merges.txt"
            )
        try:
            if older is not None:
                read, path = older
                backend, named = read(path, config)
                special_tokens = named | special_tokens
            _add_tokens(backend, folder, config, special_tokens)
            if older is not None:
                vocabularies.add_around(backend, config, special_tokens)
        except (*PASSED_ON, ValueError, OSError):
            raise
        except BaseException as error:
            raise ValueError(f"tokenizer: {folder} is damaged: {error}") from error
        eos = [token for token in eos if token < 2**32 and backend.id_to_token(token) is not None]
        named = backend.token_to_id(special_tokens.get("eos_token", ""))
        eos = list(dict.fromkeys(eos if named is None else [*eos, named]))
        return cls(backend, special_tokens=special_tokens, eos=eos, chat_template=_chat_templates(folder, config))

    def save(self, path: str | Path) -> None:
        path = require_path("path", path)
        with writing("path", path, "a file"):
            self.backend.save(str(path))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that belong around a text, a bos say, unless special is False.

        Raises: TypeError; ValueError for a lone surrogate, or naming the characters that the vocabulary lacks.
        """
        require_flag("special", special)
        try:
            return self.backend.encode(text, add_special_tokens=special).ids
        except PASSED_ON:
            raise
        except BaseException as error:
            require_text(text)
            if not isinstance(self.backend.model, tokenizers.models.WordLevel):
                raise ValueError(f"text: expected one that the tokenizer takes, which says: {error}") from error
            unknown = sorted(set(text) - self.backend.get_vocab().keys())
            named = ", ".join(repr(character) for character in unknown[:8])
            raise ValueError(
                f"text: expected only the {self.vocab_size} characters that the model was trained on, "
                f"got {named}{' and more' if len(unknown) > 8 else ''}"
            ) from error

    def encode_chat(self, messages: Sequence[Mapping], **options) -> list[int]:
        """The ids of a chat, as the chat template writes it; options: those of `chat_text`."""
        return self.encode(self.chat_text(messages, **options), special=False)

    def chat_text(
        self, messages: Sequence[Mapping],
        *, add_generation_prompt: bool | None = None, continue_final_message: bool = False, chat_template: str | None = None,
        tools: Sequence[Mapping] | None = None, documents: Sequence[Mapping] | None = None, **variables,
    ) -> str:  # fmt: skip
        """The text of a chat, as `apply_chat_template` of transformers gives it.

        Args:
            messages: each with a role, "system", "user" or "assistant" say, and a content: a text, or parts such as
                `{"type": "text", "text": "Hi"}`. What is None counts as missing.
            add_generation_prompt: whether the beginning of an answer follows; None: unless the last message is continued.
            continue_final_message: whether the text ends where the last message does, for the model to go on with it.
            chat_template: the name of one of several, or a template to use instead. None: "tool_use" if there is one and
                tools are given, or else "default".
            tools: JSON schemas of functions that the model may call.
            documents: that it may read.
            variables: further ones that the template knows, such as enable_thinking.

        Raises: TypeError, ValueError where there is no template; `fastgpt.text.chat_template.ChatTemplateError`, a ValueError, where it
        does not accept the messages, or takes more than its limits of work and size.
        """
        require_flag("continue_final_message", continue_final_message)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        require_flag("add_generation_prompt", add_generation_prompt)
        if continue_final_message and add_generation_prompt:
            raise ValueError("add_generation_prompt: expected False with continue_final_message, got True")
        given = {"tools": tools, "documents": documents}
        for name, value in given.items():
            if value is not None and not _is_list_of(Mapping, value):
                raise TypeError(f"{name}: expected a list of dicts or None, got {_shown(value)}")
        template = self._template(chat_template, tools)
        given |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        text = template.render(messages, **self.special_tokens | variables | given)
        if not messages:
            raise ValueError("messages: expected at least one, got an empty chat")
        require_text(text, "messages")
        return text

    def _template(self, chosen: str | None, tools):
        """The compiled template of a name, the one of that source, or the default."""
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
        """Templates that were used, by source."""
        return {}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens. Ids that no token has, as those that fill up a model's vocabulary, have no
        text. Raises TypeError, ValueError for what is no id at all."""
        if not isinstance(ids, Iterable):
            raise TypeError(f"ids: expected token ids one after the other, got {ids!r}")
        ids = list(ids)
        try:
            return self.backend.decode(ids, skip_special_tokens=True)
        except PASSED_ON:
            raise
        except BaseException as error:
            for token in ids:
                require_integer("ids", token, 0, 2**32 - 1)
            raise ValueError(f"ids: expected some that the tokenizer takes, which says: {error}") from error

    def special_texts(self) -> dict[int, str]:
        """Ids of the special tokens, which `decode` leaves out -> how they are written."""
        return {index: token.content for index, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def decode_stream(self, ids: Iterable[int]):
        """Yields text as ids come, each piece as soon as it is whole characters."""
        stream = IncrementalDetokenizer(self)
        for token in ids:
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece


class IncrementalDetokenizer:
    """The text of tokens that come one by one, in whole characters.

    Args:
        prompt: ids before them, whose text is not given but may decide about the text of the first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        latest = max(len(prompt) - CONTEXT, 0)
        for begin in range(latest, max(latest - 4, -1), -1):  # not amidst a character
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

    What may be the beginning of a stop string is held back. The cut is the same whatever the pieces. Special tokens, which are
    no text, count as part of it where they are a part of a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop, self.found = list(stop), False
        self.held, self.is_text = "", []  # characters, and whether each is text

    def push(self, piece: str, is_text: bool = True) -> str:
        """The text that is certain; nothing more once a stop string is `found`. is_text: False for a special token."""
        if not self.stop or self.found:
            return piece if is_text and not self.found else ""
        if not is_text and not any(piece in stop for stop in self.stop):
            return ""
        text = self.held + piece
        self.is_text += [is_text] * len(piece)
        begins = {stop: text.find(stop) for stop in self.stop if stop in text}
        if begins:
            self.found = True
            first = min(begins, key=lambda stop: (begins[stop] + len(stop), begins[stop]))
            return self._release(text, begins[first])
        held = max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
        )
        return self._release(text, len(text) - held)

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        return "" if self.found else self._release(self.held, len(self.held))

    def _release(self, text: str, end: int) -> str:
        released = "".join(character for character, is_text in zip(text[:end], self.is_text) if is_text)
        self.held, self.is_text = text[end:], self.is_text[end:]
        return released


def unescape(text: str, name: str = "text") -> str:
    r"""What a shell passes on as written: \n, \r, \t, \\, \0, \xNN, \uNNNN, \UNNNNNNNN become the characters they stand for.

    A backslash before anything else stays. For options such as --stop, each of whose values goes through it.

    Args:
        name: of the option, for errors.

    Raises: ValueError for what is no character.
    """

    def character(escape: re.Match) -> str:
        code = escape[1]
        return ESCAPES[code] if code in ESCAPES else chr(int(code[1:], 16))

    try:
        result = re.sub(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[nrt0\\])", character, text)
        return result.encode("utf-16", "surrogatepass").decode("utf-16")  # \uD83D\uDE00 is one character
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected escapes of characters, got {text!r}") from error


ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}


def require_text(value, name: str = "text") -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected characters, got the lone surrogate {value[error.start]!r} at position {error.start}"
        ) from error


def _require_safe(content: str) -> None:
    """Raises what is wrong with a regular expression or a prefix in a tokenizer.json.

    The library's own message can hold half a character, which ends the process (tokenizers 0.23): of a regular expression that
    is not ASCII; of the second token of a merge, from which it cuts as many bytes as the prefix of later parts of a word has.
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


def _shown(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:200] + " ..."


# What a folder says besides

TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _special_tokens(folder: Path, config: dict) -> dict[str, str]:
    """Names of special tokens -> what they are."""
    result = {}
    for source in (read_json(folder, "special_tokens_map.json"), config):
        for name, token in source.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                result[name] = token
    return result


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict, special_tokens: dict[str, str]) -> None:
    """Adds the tokens that the vocabulary lacks, and makes those special that are named so."""
    special = list(special_tokens.values())
    for source in (read_json(folder, "special_tokens_map.json"), config):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.get(name)
            listed = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
            special += [token["content"] if isinstance(token, dict) and "content" in token else token for token in listed]
    special = [token for token in dict.fromkeys(token for token in special if isinstance(token, str)) if token]

    declared = {}  # id -> token, in files of which the last goes before the others
    path = folder / "added_tokens.json"
    for content, index in read_json(folder, path.name).items():
        declared[_added_id(path, index)] = tokenizers.AddedToken(
            content, special=content in special, normalized=content not in special
        )
    path = folder / "tokenizer_config.json"
    entries = config.get("added_tokens_decoder") or {}
    for index, entry in entries.items() if isinstance(entries, dict) else [(None, entries)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not index:
            raise ValueError(
                f"tokenizer: {path} is damaged: added_tokens_decoder: expected ids with a dict that has a content each, "
                f"got {_shown({index: entry})}"
            )
        flags = {flag: entry[flag] is True for flag in TOKEN_FLAGS if flag in entry}
        declared[_added_id(path, index)] = tokenizers.AddedToken(entry["content"], **flags)

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    lacking = {index: token for index, token in sorted(declared.items()) if token.content and token.content not in added}
    new = [index for index, token in lacking.items() if backend.token_to_id(token.content) is None]
    backend.add_tokens(list(lacking.values()))
    for index in new:
        if (got := backend.token_to_id(lacking[index].content)) != index:
            raise ValueError(
                f"tokenizer: {folder}: expected added tokens that follow on the vocabulary, {lacking[index].content!r} has the "
                f"id {index} instead of {got}"
            )
    added |= {token.content for token in lacking.values()}
    known = [token for token in special if token not in added and backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in known])


def _added_id(path: Path, index) -> int:
    try:
        return require_integer("id", int(index) if isinstance(index, str) else index, 0, 2**31)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is damaged: an added token: {error}") from error


def _chat_templates(folder: Path, config: dict) -> str | dict[str, str] | None:
    """The one template, or several by name."""
    path = folder / "tokenizer_config.json"
    stored = config.get("chat_template")
    if isinstance(stored, list):  # several, by name
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in stored):
            raise ValueError(f"tokenizer: {path} is damaged: chat_template: expected dicts with name and template")
        stored = [(entry["name"], entry["template"]) for entry in stored]
    elif isinstance(stored, dict):
        stored = list(stored.items())
    else:
        stored = [("default", stored)] if stored is not None else []
    if not all(isinstance(part, str) for entry in stored for part in entry):
        raise ValueError(f"tokenizer: {path} is damaged: chat_template: expected texts, by name, got {_shown(stored)}")
    templates = dict(stored)
    if (path := find(folder, "chat_template.jinja")) is not None:
        templates["default"] = read_text(path)
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        if find(folder, path.relative_to(folder)) is not None:
            templates[path.stem] = read_text(path)
    return templates.get("default") if templates.keys() <= {"default"} else templates


def _eos_ids(folder: Path) -> list[int]:
    """The tokens that end a text, whether the vocabulary has them or not."""
    generation = read_json(folder, "generation_config.json")
    path, config = folder / "generation_config.json", generation
    if "eos_token_id" not in generation:
        path = folder / "config.json"
        config = read_json(folder, path.name)
    stored = config.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"tokenizer: {path} is damaged: eos_token_id: expected ids, got {_shown(stored)}")
    return [token for token in ids if token >= 0]
