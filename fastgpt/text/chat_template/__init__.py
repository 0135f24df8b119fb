"""Chat templates: Jinja templates that turn messages into a prompt, as in transformers, within limits of work and size.

A template comes with a checkpoint and is untrusted. It runs in Jinja's sandbox, sees only plain data, and its work is counted:
each pass through a loop, macro or block costs the number of its syntax nodes, and an operation whose work depends on its
operands costs their size, before it makes anything large. The count does not depend on the machine: a template that runs on one
machine runs on all.

    messages.py     plain data for templates
    budget.py       the work and size that a template may still use
    costs.py        the cost of each method and filter
    sandbox.py      the Jinja environment that charges these costs
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables

from fastgpt.text.chat_template.budget import Budget, limited
from fastgpt.text.chat_template.messages import ChatTemplateError, PlainData, cut_at_end, mark_end, prepared
from fastgpt.text.chat_template.sandbox import ENVIRONMENT, CountSteps, count_nodes

SOURCE_SIZE, SOURCE_NODES = 100_000, 15_000  # characters of a template, nodes of its syntax tree; five times the largest known


class ChatTemplate:
    """A chat template in Jinja.

    Raises: ChatTemplateError if it is not valid Jinja or exceeds the limits.
    """

    def __init__(self, source: str):
        if not isinstance(source, str):
            raise ChatTemplateError(f"chat_template: expected a Jinja template as a str, got {type(source).__name__}")
        if len(source) > SOURCE_SIZE:
            raise ChatTemplateError(f"chat_template: expected at most {SOURCE_SIZE:,} characters, got {len(source):,}")
        try:
            with limited(Budget()):
                tree = ENVIRONMENT.parse(source)
                if (count := count_nodes(tree)) > SOURCE_NODES:
                    raise ChatTemplateError(f"chat_template: expected at most {SOURCE_NODES:,} nodes, got {count:,}")
                self.variables = frozenset(find_undeclared_variables(tree))  # that it reads
                self.template = ENVIRONMENT.from_string(CountSteps().visit(tree))
        except ChatTemplateError:
            raise
        except Exception as error:  # Python compiles what Jinja makes of it, and has limits of its own
            raise ChatTemplateError(f"chat_template: expected a Jinja template, but {_shown(error)}") from error

    def render(self, messages: Sequence[Mapping], *, continue_final_message: bool = False, **variables: Any) -> str:
        """The prompt.

        Args:
            messages: entries that are None are ignored. A content that is a list of text parts is printed as their text, for
                templates that expect text.
            continue_final_message: whether the prompt ends with the content of the last message.
            variables: further variables of the template: strings, numbers, lists and dicts.

        Raises: ChatTemplateError; TypeError for anything but plain data.
        """
        data = PlainData()
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        chat = [data.copy("messages", message) for message in messages] if is_list else None
        if chat is None or not all(isinstance(message, dict) and "role" in message for message in chat):
            raise TypeError(f"messages: expected a list of dicts with role and content, got {repr(messages)[:200]}")
        chat = [prepared(message) for message in chat]
        given = {"tools": None, "documents": None} | variables  # templates ask whether they are None
        given = {name: data.copy(name, value) for name, value in given.items()}
        if continue_final_message:
            mark_end(chat)
        try:
            prompt = self._run(chat, given, data)
        except ChatTemplateError:
            # Some templates add the content to a string, which a message that only calls tools may lack.
            complete = [{"content": ""} | message for message in chat]
            if complete == chat:
                raise
            prompt = self._run(complete, given, data)
        return cut_at_end(prompt) if continue_final_message else prompt

    def _run(self, chat: list[dict], given: dict, data: PlainData) -> str:
        try:
            with limited(Budget(data)):
                return self.template.render(given, messages=chat)
        except ChatTemplateError:
            raise
        except Exception as error:  # ZeroDivisionError, RecursionError, ...: it can raise anything
            raise ChatTemplateError(f"messages: the chat template does not accept them: {_shown(error)}") from error


def _shown(error: Exception) -> str:
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else text[:500] + " ..."
