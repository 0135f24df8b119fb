"""A Jinja sandbox that charges every operation for its work."""

import json
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import update_wrapper, wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from fastgpt.text.chat_template.budget import BUDGET, CONTAINERS, INTEGER_BITS, ITERABLES
from fastgpt.text.chat_template.costs import (
    COMPARING,
    FILTERS,
    LAZY,
    METHODS,
    Cost,
    largest_number,
    pay_for_formatting,
    pay_for_reading,
    pay_nothing,
)
from fastgpt.text.chat_template.messages import ChatTemplateError

CALL = 10  # steps for a call of a function or a filter
SCOPES = ("_loop_vars", "_block_vars")  # what Jinja passes to every call in a loop or a block


class CountSteps(NodeTransformer):
    """Inserts charges into the syntax tree, as filters whose names no template can write."""

    def _count_body(self, node: Any) -> nodes.Node:
        work = count_nodes(node)
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(work), "$step", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if getattr(node, "test", None) is not None:  # of a loop
            node.test = nodes.And(step, node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _count_body

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else nodes.Filter(node, "$made", [], [], None, None)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._read(pair.key)
        return nodes.Filter(node, "$made", [], [], None, None)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "$concat", [], [], None, None)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._read(node.expr)
        for operand in node.ops:
            operand.expr = self._read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return nodes.Filter(node.node, "$slice", bounds, [], None, None)

    def _read(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else nodes.Filter(node, "$read", [], [], None, None)


def count_nodes(tree: nodes.Node) -> int:
    return sum(1 for _ in tree.find_all(nodes.Node))


# They take the context, since Jinja evaluates other filters of constants when it compiles a template.


@pass_context
def _step(context, work) -> bool:
    BUDGET.get().spend(work)
    return True  # it is followed by the condition of a loop


@pass_context
def _made(context, value):
    return BUDGET.get().checked(value)


@pass_context
def _read(context, value):
    BUDGET.get().read(value)
    return value


@pass_context
def _concat(context, values):
    BUDGET.get().take(sum(map(BUDGET.get().weigh, values)))
    return "".join(map(str, values))


@pass_context
def _sliced(context, value, start, stop, step):
    BUDGET.get().read(value)
    return BUDGET.get().checked(value[start:stop:step])


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that charges every operation for its work."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins the output of a template."""
        budget, kept, size = BUDGET.get(), [], 0
        for piece in pieces:
            size += len(piece)
            budget.take(size if size > budget.most else len(piece))
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        budget.spend(1)
        if operator == "*":
            sequence, count = (left, right) if isinstance(left, (str, *CONTAINERS)) else (right, left)
            if isinstance(sequence, (str, *CONTAINERS)) and isinstance(count, int):
                budget.take(budget.weigh(sequence) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > INTEGER_BITS:
                raise ChatTemplateError(
                    f"chat_template: expected integers of at most {INTEGER_BITS} bits, got {left} ** {right}"
                )
        elif operator == "%" and isinstance(left, str):
            pay_for_formatting(budget, left, right)
        elif operator == "+" and isinstance(left, (str, *CONTAINERS)):
            budget.take(budget.weigh(left) + budget.weigh(right))
        return budget.checked(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        BUDGET.get().spend(6)  # filters read an attribute of each entry, which may raise and catch an exception
        if not isinstance(argument, (str, int)):  # a tuple, say, whose hash is computed
            BUDGET.get().read(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # `mapping` of a view would be another reference to its dict.
        return super().is_safe_attribute(obj, attr, value) and not isinstance(obj, ITERABLES)

    def call(
        __self, __context: Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:  # mangled, so that no keyword of a template has these names
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
            args = tuple(_listed(value) for value in args)
            bound(budget, owner, *args, **given)
        with budget.calling():
            return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
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
    """`str.format` with fields of limited width."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        BUDGET.get().take(BUDGET.get().weigh(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        BUDGET.get().take(largest_number(format_spec))
        return super().format_field(value, format_spec)


class EscapingFormatter(LimitedFormatter, SandboxedEscapeFormatter):
    """`Markup.format`, likewise."""


def _listed(value: Any) -> Any:
    """An iterator as a list, whose size is known."""
    return list(value) if isinstance(value, Iterator) else value


def _counted(items: Iterable) -> Iterator:
    """Yields the items, and charges a step for each."""
    for item in items:
        BUDGET.get().spend(1)
        yield item


def _paying(function: Callable, bound: Cost, lazy: bool = False) -> Callable:
    """Wraps a filter or test, so that it is charged for its work."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after what Jinja passes, such as the environment

    @wraps(function)
    def guarded(*args, **kwargs):
        budget = BUDGET.get()
        budget.spend(CALL + len(args) + len(kwargs))
        args = list(args)
        if bound is not pay_nothing and not lazy:
            args[first:] = map(_listed, args[first:])
        bound(budget, *args[first:], **kwargs)
        if lazy and args[first]:
            args[first] = _counted(args[first])
        result = function(*args, **kwargs)
        return _counted(result) if isinstance(result, types.GeneratorType) else budget.checked(result)

    return guarded


def _printed(value: Any) -> Any:
    """Charges for turning a value into text."""
    if not isinstance(value, str):
        BUDGET.get().read(value)
    return value


class Generation(Extension):
    """{% generation %} marks what the model generates, for masks in training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateNamespace(Namespace):
    def __repr__(self):  # without its entries, which may contain it
        return "<namespace>"


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes of Jinja's own, which are for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise SecurityError("a format of more than 1,000 characters is not safe")
    return datetime.now().strftime(format)


def _environment() -> LimitedEnvironment:
    result = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], optimized=False,
        finalize=_printed,
    )  # fmt: skip
    filters: dict[str, Any] = result.filters | {"tojson": _tojson}
    result.filters = {name: _paying(filters[name], bound, name in LAZY) for name, bound in FILTERS.items()}
    result.filters |= {"$step": _step, "$made": _made, "$read": _read, "$concat": _concat, "$slice": _sliced}
    tests: dict[str, Any] = result.tests
    result.tests = {name: _paying(test, pay_for_reading) if name in COMPARING else test for name, test in tests.items()}
    result.globals.pop("lipsum")
    result.globals |= {
        "namespace": TemplateNamespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now,
    }  # fmt: skip
    return result


ENVIRONMENT = _environment()
