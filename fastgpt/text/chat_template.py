"""Chat templates: how messages become a prompt, in Jinja, as transformers runs it, within limits of work and size.

A template comes with a checkpoint, so from strangers. It runs in Jinja's sandbox, sees plain data only, and everything it
does is counted: `Limits` puts a step into every loop, macro and block of its syntax tree, worth the number of nodes there,
and an operation whose work depends on its operands pays for their size, before it makes anything large. The count does not
depend on the machine: a template that runs on one runs on all.
"""

import dataclasses
import json
import re
import types
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import update_wrapper, wraps

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

SOURCE_SIZE, SOURCE_NODES = 100_000, 15_000  # characters of a template, nodes of its syntax tree; the longest have a fifth
WORK = 1_000_000  # steps, of up to a microsecond; a chat of ten messages takes some thousands
CALL = 10  # steps that a call takes, of a filter as well
CALLS = 100  # of macros, loops and blocks in each other
WORK_PER_CHARACTER, WORK_PER_ENTRY = 64, 500  # of messages, tools, documents, variables: what is long may take longer
SIZE, SIZE_PER_CHARACTER = 4_000_000, 16  # characters and entries of one value, and of the prompt; likewise
CHARACTERS_PER_STEP = 8  # that are copied or looked at
INTEGER_BITS = 4096
LARGE = 10**18  # more than anything has the size of
SCOPES = ("_loop_vars", "_block_vars")  # what Jinja passes on to every call that is made within a loop or a block
DEPTH = 100  # of lists and dicts in each other
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one entry of a message, the usual one first
END = "\ue000end of the last message\ue000 "


class ChatTemplateError(ValueError):
    """A chat template is no Jinja, exceeds the limits, or does not accept the messages."""


class ChatTemplate:
    """A template in Jinja.

    Raises: ChatTemplateError if it is none, or exceeds the limits.
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
                self.template = ENVIRONMENT.from_string(Limits().visit(tree))
        except ChatTemplateError:
            raise
        except Exception as error:  # Python compiles what Jinja makes of it, and has limits of its own
            raise ChatTemplateError(f"chat_template: expected a Jinja template, but {shown(error)}") from error

    def render(self, messages: Sequence[Mapping], *, continue_final_message: bool = False, **variables) -> str:
        """The prompt.

        Args:
            messages: an entry that is None counts as missing. A content that is a list of text parts prints as their text
                where the template takes every content for text.
            continue_final_message: the prompt ends where the content of the last message does.
            variables: what else the template sees: strings, numbers, lists and dicts.

        Raises: ChatTemplateError; TypeError for what is not such plain data.
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

    def _run(self, chat: list[dict], given: dict, data: "PlainData") -> str:
        try:
            with limited(Budget(data)):
                return self.template.render(given, messages=chat)
        except ChatTemplateError:
            raise
        except Exception as error:  # ZeroDivisionError, RecursionError, ...: it can raise anything
            raise ChatTemplateError(f"messages: the chat template does not accept them: {shown(error)}") from error


def shown(error: Exception) -> str:
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else text[:500] + " ..."


# What a template sees


class PlainData:
    """Copies what is given to a template, and counts its characters and entries.

    The copies have exactly Python's types: the sandbox would have to know the methods of all others.
    """

    def __init__(self):
        self.characters = self.entries = 0

    def copy(self, name: str, value, depth: int = 0):
        """name: of the argument, for errors."""
        if depth > DEPTH:
            raise ChatTemplateError(f"{name}: expected at most {DEPTH} lists and dicts in each other")
        self.entries += 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self.characters += len(value)
            return str.__str__(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, (list, tuple)):
            copies = (self.copy(name, entry, depth + 1) for entry in value)
            return tuple(copies) if isinstance(value, tuple) else list(copies)
        if callable(getattr(value, "model_dump", None)):  # pydantic's, which chat clients have
            return self.copy(name, value.model_dump(), depth + 1)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {self.copy(name, key, depth + 1): self.copy(name, entry, depth + 1) for key, entry in value.items()}
        if getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
            return self.copy(name, value.item(), depth + 1)
        raise TypeError(f"{name}: expected strings, numbers, lists and dicts, got {type(value).__name__} among them")


class TextParts(list):
    """A content in parts, all of them text, which prints as the text. To templates that know parts it is a list of them."""

    def __str__(self):
        return "".join(part["text"] for part in self)

    def __add__(self, other):
        return str(self) + other if isinstance(other, str) else list(self) + other

    def __radd__(self, other):
        return other + str(self)


def prepared(message: dict) -> dict:
    """A message as templates expect it: without entries that are None, its reasoning under each of the usual names."""
    message = {name: value for name, value in message.items() if value is not None}
    for name in REASONING:
        if name in message:
            message = {"thinking": message[name]} | message | {"reasoning_content": message[name]}
            break
    content = message.get("content")
    if isinstance(content, list) and content and all(is_text_part(part) for part in content):
        message["content"] = TextParts(content)
    return message


def is_text_part(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def mark_end(chat: list[dict]) -> None:
    """Puts END behind the text of the last message."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, TextParts):
        content[-1]["text"] += END
    elif isinstance(content, str):
        chat[-1]["content"] += END
    else:
        raise ChatTemplateError("messages: expected a last message with text as its content, to be continued")


def cut_at_end(prompt: str) -> str:
    before, mark, after = prompt.rpartition(END.rstrip())
    if not mark:
        raise ChatTemplateError("messages: expected a last message that can be continued, the chat template leaves it out")
    return before if after.startswith(" ") else before.rstrip()  # a template that trims contents would have trimmed it


# Limits


class Budget:
    """What a template may still do; data: what is given to it."""

    def __init__(self, data: PlainData | None = None):
        characters, entries = (data.characters, data.entries) if data else (0, 0)
        self.work = WORK + WORK_PER_CHARACTER * characters + WORK_PER_ENTRY * entries
        self.most = SIZE + SIZE_PER_CHARACTER * characters
        self.calls = 0  # that are being made
        self.weights = {}  # id of a list or dict -> (weight, entries, depth), and itself, so that its id remains its own

    def spend(self, steps: int) -> None:
        self.work -= steps
        if self.work < 0:
            raise ChatTemplateError("chat_template: expected one that ends, this one takes too many steps")

    def take(self, size: int) -> None:
        """Pays for making something of so many characters or entries."""
        if size > self.most:
            raise ChatTemplateError(
                f"chat_template: expected one that makes at most {self.most:,} characters of these messages, got {size:,}"
            )
        self.spend(1 + size // CHARACTERS_PER_STEP)

    @contextmanager
    def calling(self):
        self.calls += 1
        if self.calls > CALLS:
            raise ChatTemplateError(f"chat_template: expected at most {CALLS} calls in each other")
        yield
        self.calls -= 1

    def read(self, *values) -> None:
        """Pays for looking at all that is in the values."""
        self.spend(1 + sum(map(self.weigh, values)) // CHARACTERS_PER_STEP)

    def weigh(self, value) -> int:
        """Characters and entries of a value, with all that is in it, as often as it is in it."""
        return len(value) if isinstance(value, str) else self.measure(value)[0]

    def measure(self, value) -> tuple[int, int, int]:
        """The weight, the number of entries in it and in these, and how deep they are in each other."""
        if isinstance(value, str):
            return len(value), 1, 0
        if isinstance(value, ITERABLES):
            value = list(value)
        elif not isinstance(value, CONTAINERS):
            return 1, 1, 0
        if (known := self.weights.get(id(value))) is not None:
            return known[0]
        self.spend(2 * len(value))
        parts = [self.measure(entry) for entry in value]
        if isinstance(value, dict):
            parts += [self.measure(entry) for entry in value.values()]
        weight, entries = (1 + sum(part[i] for part in parts) for i in range(2))
        depth = 1 + max((part[2] for part in parts), default=0)
        if weight > self.most or depth > 2 * DEPTH:
            raise ChatTemplateError(
                f"chat_template: expected one whose values have at most {self.most:,} characters and entries and are at "
                f"most {2 * DEPTH} lists deep, got {weight:,} and {depth}"
            )
        self.weights[id(value)] = (weight, entries, depth), value
        return weight, entries, depth

    def checked(self, value):
        """Pays for a value that was made."""
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            raise ChatTemplateError(
                f"chat_template: expected one whose integers have at most {INTEGER_BITS} bits, got {value.bit_length():,}"
            )
        elif isinstance(value, CONTAINERS):
            self.take(self.weigh(value))
        return value

    def indentation(self, value, width: int) -> int:
        """At most so many spaces has the value as JSON."""
        _, entries, depth = self.measure(value)
        return 2 * entries * depth * width


CONTAINERS = (list, tuple, dict)
ITERABLES = (range, KeysView, ValuesView, ItemsView)  # which have all their entries, but are made anew each time
BUDGET: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(budget: Budget):
    token = BUDGET.set(budget)
    try:
        yield
    finally:
        BUDGET.reset(token)


class Limits(NodeTransformer):
    """Inserts what counts into the syntax tree, as filters whose names no template can write."""

    def _count_body(self, node):
        work = count_nodes(node)
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(work), "$step", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if getattr(node, "test", None) is not None:  # of a loop
            node.test = nodes.And(step, node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _count_body

    def visit_List(self, node):
        self.generic_visit(node)
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else nodes.Filter(node, "$made", [], [], None, None)

    def visit_Tuple(self, node):
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node):
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._read(pair.key)
        return nodes.Filter(node, "$made", [], [], None, None)

    def visit_Concat(self, node):
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "$concat", [], [], None, None)

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.expr = self._read(node.expr)
        for operand in node.ops:
            operand.expr = self._read(operand.expr)
        return node

    def visit_Getitem(self, node):
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return nodes.Filter(node.node, "$slice", bounds, [], None, None)

    def _read(self, node):
        return node if isinstance(node, nodes.Const) else nodes.Filter(node, "$read", [], [], None, None)


def count_nodes(tree: nodes.Node) -> int:
    return sum(1 for _ in tree.find_all(nodes.Node))


# Jinja computes a filter of constants when it compiles, except one that takes the context.


@pass_context
def step(context, work) -> bool:
    BUDGET.get().spend(work)
    return True  # and then comes the condition of a loop


@pass_context
def made(context, value):
    return BUDGET.get().checked(value)


@pass_context
def read(context, value):
    BUDGET.get().read(value)
    return value


@pass_context
def concat(context, values):
    BUDGET.get().take(sum(map(BUDGET.get().weigh, values)))
    return "".join(map(str, values))


@pass_context
def sliced(context, value, start, stop, step):
    BUDGET.get().read(value)
    return BUDGET.get().checked(value[start:stop:step])


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which every operation pays for its work."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def concat(self, pieces) -> str:
        """Joins what was printed."""
        budget, kept, size = BUDGET.get(), [], 0
        for piece in pieces:
            size += len(piece)
            budget.take(size if size > budget.most else len(piece))
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context, operator, left, right):
        budget = BUDGET.get()
        budget.spend(1)
        if operator == "*":
            sequence, count = (left, right) if isinstance(left, (str, *CONTAINERS)) else (right, left)
            if isinstance(sequence, (str, *CONTAINERS)) and isinstance(count, int):
                budget.take(budget.weigh(sequence) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > INTEGER_BITS:
                raise ChatTemplateError(
                    f"chat_template: expected one whose integers have at most {INTEGER_BITS} bits, got {left} ** {right}"
                )
        elif operator == "%" and isinstance(left, str):
            require_small_format(budget, left, right)
        elif operator == "+" and isinstance(left, (str, *CONTAINERS)):
            budget.take(budget.weigh(left) + budget.weigh(right))
        return budget.checked(super().call_binop(context, operator, left, right))

    def getitem(self, obj, argument):
        BUDGET.get().spend(6)  # filters take attributes of all entries, at the cost of an exception each
        if not isinstance(argument, (str, int)):  # a tuple, say, whose hash is computed
            BUDGET.get().read(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj, attr, value) -> bool:
        # What a view is of would be another name for a dict.
        return super().is_safe_attribute(obj, attr, value) and not isinstance(obj, ITERABLES)

    def call(__self, __context, __obj, *args, **kwargs):  # names that no keyword of a template has
        budget = BUDGET.get()
        given = {name: value for name, value in kwargs.items() if name not in SCOPES}
        budget.spend(CALL + len(args) + len(given))
        if not isinstance(__obj, Macro):
            budget.read(*args, *given.values())
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, str):  # Markup's are not built in
            bound = METHODS.get(type(owner), {}).get(__obj.__name__)
            if bound is None:
                raise SecurityError(f"{__obj.__name__!r} is not safely callable")
            args = [listed(value) for value in args]
            bound(budget, owner, *args, **given)
        with budget.calling():
            return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value):
        name = getattr(value, "__name__", None)
        if name not in ("format", "format_map") or not isinstance(getattr(value, "__self__", None), str):
            return None
        text = value.__self__
        formatter = EscapingFormatter(self, escape=text.escape) if isinstance(text, Markup) else LimitedFormatter(self)

        def formatted(*args, **kwargs):
            if name == "format_map":
                (kwargs,), args = args, ()
            return type(text)(formatter.vformat(str(text), args, kwargs))

        return update_wrapper(formatted, value)


class LimitedFormatter(SandboxedFormatter):
    """`str.format` whose fields are of limited width."""

    def convert_field(self, value, conversion):
        BUDGET.get().take(BUDGET.get().weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value, format_spec):
        BUDGET.get().take(largest_number(format_spec))
        return super().format_field(value, format_spec)


class EscapingFormatter(LimitedFormatter, SandboxedEscapeFormatter):
    """That of Markup."""


def require_small_format(budget: Budget, text: str, values) -> None:
    """Pays for `text % values`."""
    budget.take(len(text))
    if "*" in text:
        raise SecurityError("a width of * in a format is not safe")
    budget.take(text.count("%") * (largest_number(text) + budget.weigh(values)))


def largest_number(text: str) -> int:
    """Of those in a format, which are widths and precisions, or at least not smaller. Python takes every script's digits, and
    any number of zeros before a number."""
    found = re.findall(r"\d+", text)
    return max((min(int(digits), LARGE) if len(digits) < 1000 else LARGE for digits in found), default=0)


def listed(value):
    """What is computed bit by bit as a list, of which the size is known."""
    return list(value) if isinstance(value, Iterator) else value


def counted(items):
    for item in items:
        BUDGET.get().spend(1)
        yield item


# What operations pay for beforehand: (budget, value, *arguments). What they made is looked at afterwards.


def looks(budget, value, *args, **kwargs):
    budget.read(value, *args, *kwargs.values())


def looks_closely(budget, value, *args, **kwargs):
    """Some steps for each entry: it makes many small values, or compares."""
    looks(budget, value, *args, **kwargs)
    weight, entries = budget.measure(value)[:2]
    budget.spend(weight + 10 * entries)


def free(budget, value, *args, **kwargs):
    """It does not depend on the size."""


def copies(budget, value, *args, **kwargs):
    """Its entries, not what is in them."""
    budget.spend(len(value) if hasattr(value, "__len__") else 0)


def pads(budget, value, width=80, *rest):
    looks(budget, value)
    budget.take(width)


def expands_tabs(budget, value, tabsize=8):
    budget.take(len(value) + value.count("\t") * tabsize)


def replaces(budget, value, old, new, count=-1):
    value, old, new = str(value), str(old), str(new)
    looks(budget, value)
    found = value.count(old)
    budget.take(len(value) + (found if count is None or count < 0 else min(found, count)) * len(new))


def joins(budget, value, d="", attribute=None):
    looks_closely(budget, value)
    budget.take(len(value) * budget.weigh(d))


def joins_by(budget, separator, values):
    joins(budget, values, separator)


def indents(budget, value, width=4, *args, **kwargs):
    looks(budget, value)
    lines = str(value).count("\n") + 1
    budget.take(lines * (width if isinstance(width, int) else budget.weigh(width)))


def rounds(budget, value, precision=0, method="common"):
    if not -300 <= precision <= 300:
        raise SecurityError(f"a precision of {precision} is not safe")


def gathers(budget, value, count, fill_with=None):
    copies(budget, value)
    budget.take(count)


def sums(budget, value, attribute=None, start=0):
    looks_closely(budget, value)
    if not isinstance(start, (int, float)):
        raise SecurityError("a sum of what is no number is not safe")


def formats(budget, value, *args, **kwargs):
    require_small_format(budget, str(value), args or kwargs)


def writes_json(budget, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    looks_closely(budget, value)
    width = indent if isinstance(indent, int) else budget.weigh(indent or "")
    budget.take(budget.indentation(value, max(width, budget.weigh(separators or ""))))


METHODS = {
    str: dict.fromkeys(
        "strip lstrip rstrip startswith endswith removeprefix removesuffix find rfind index rindex count upper lower "
        "capitalize casefold swapcase isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable "
        "isspace istitle isupper".split(), looks,
    ) | dict.fromkeys("split rsplit splitlines partition rpartition title".split(), looks_closely)
    | dict.fromkeys("center ljust rjust zfill".split(), pads)
    | {"replace": replaces, "join": joins_by, "expandtabs": expands_tabs},
    dict: dict.fromkeys("get keys values items".split(), free) | {"copy": copies},
    list: {"count": looks, "index": looks, "copy": copies},
    tuple: {"count": looks, "index": looks},
    int: {"bit_length": free, "is_integer": free},
    float: {"is_integer": free},
}  # fmt: skip
METHODS |= {TextParts: METHODS[list], Markup: METHODS[str]}
FILTERS = (
    dict.fromkeys("attr count d default first items last length map reject rejectattr select selectattr".split(), free)
    | dict.fromkeys("list reverse".split(), copies)
    | dict.fromkeys("abs capitalize e escape float int lower safe string trim truncate upper".split(), looks)
    | dict.fromkeys("dictsort groupby max min sort title unique".split(), looks_closely)
    | {"batch": gathers, "center": pads, "format": formats, "indent": indents, "join": joins, "replace": replaces}
    | {"round": rounds, "slice": gathers, "sum": sums, "tojson": writes_json}
)
LAZY = {"map", "reject", "rejectattr", "select", "selectattr", "unique"}  # read what they get when it is asked for


def paying(function, bound, lazy: bool = False):
    """The filter or test, which pays for its work."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # before it, the environment, say

    @wraps(function)
    def guarded(*args, **kwargs):
        budget = BUDGET.get()
        budget.spend(CALL + len(args) + len(kwargs))
        args = list(args)
        if bound is not free and not lazy:
            args[first:] = map(listed, args[first:])
        bound(budget, *args[first:], **kwargs)
        if lazy and args[first]:
            args[first] = counted(args[first])
        result = function(*args, **kwargs)
        return counted(result) if isinstance(result, types.GeneratorType) else budget.checked(result)

    return guarded


def printed(value):
    """Pays for turning it into text."""
    if not isinstance(value, str):
        BUDGET.get().read(value)
    return value


class Generation(Extension):
    """{% generation %} marks the model's part, which matters in training; here it just contains it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class TemplateNamespace(Namespace):
    def __repr__(self):  # without its entries, of which it may be one
        return "<namespace>"


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without the escapes of Jinja's own, which are for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str):
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise SecurityError("a format of more than 1,000 characters is not safe")
    return datetime.now().strftime(format)


def environment() -> LimitedEnvironment:
    result = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], optimized=False,
        finalize=printed,
    )  # fmt: skip
    filters = result.filters | {"tojson": tojson}
    result.filters = {name: paying(filters[name], bound, name in LAZY) for name, bound in FILTERS.items()}
    result.filters |= {"$step": step, "$made": made, "$read": read, "$concat": concat, "$slice": sliced}
    result.tests = {name: paying(test, looks) if name in COMPARING else test for name, test in result.tests.items()}
    result.globals.pop("lipsum")
    result.globals |= {
        "namespace": TemplateNamespace, "raise_exception": raise_exception, "strftime_now": strftime_now,
    }  # fmt: skip
    return result


COMPARING = set("== eq equalto != ne < lt lessthan <= le > gt greaterthan >= ge in lower upper divisibleby".split())
ENVIRONMENT = environment()
