"""Chat templates: how messages become a prompt, in Jinja, as transformers runs it."""

import json
from collections.abc import Sequence
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A template in Jinja. It comes with a checkpoint from anywhere, so it runs in a sandbox.

    Raises: ValueError if it is no Jinja.
    """

    def __init__(self, source: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat_template: expected a Jinja template, but {error}") from error

    def render(self, messages: Sequence[dict], **variables) -> str:
        """The prompt. Raises ValueError if the template does not accept the messages."""
        given = {"tools": None, "documents": None} | variables  # templates ask whether they are None
        try:
            return self.template.render(messages=messages, **given)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"messages: the chat template does not accept them: {error}") from error


class Generation(Extension):
    """{% generation %} marks the model's part, which matters in training; here it just contains it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without the escapes of Jinja's own, which are for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str):
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
