"""Public functions, which are those that other files may call, say the types of what they take and return."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastgpt
import fastgpt.testing

PACKAGE = Path(fastgpt.__file__).parent
METHODS = ("__init__", "__call__", "__enter__", "__exit__", "__iter__")  # that are public despite their underscores
FILES = sorted(PACKAGE.rglob("*.py"))


def functions():
    """Of the public names and their classes' public methods: (name, function)."""
    for module in (fastgpt, fastgpt.testing):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for attribute, method in vars(value).items():
                    if inspect.isfunction(method) and (not attribute.startswith("_") or attribute in METHODS):
                        yield f"{module.__name__}.{name}.{attribute}", method


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in functions()])
def test_public_names_are_annotated(function):
    """But for *args and **kwargs, which go on to somewhere that is."""
    signature = inspect.signature(function)
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = [p for p in signature.parameters.values() if p.name != "self" and p.kind not in several]
    assert not [p.name for p in parameters if p.annotation is p.empty]
    assert signature.return_annotation is not signature.empty


def missing(body: list, inside: str = ""):
    """What public functions and methods in the body of a module or a class leave out."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_") and node.name not in METHODS:
            continue
        if isinstance(node, ast.ClassDef):
            yield from missing(node.body, f"{inside}{node.name}.")
            continue
        if any(re.search(r"\bkernel\b|\bjit\b", ast.unparse(decorator)) for decorator in node.decorator_list):
            continue  # Triton's language, in which annotations of parameters are its own
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if argument.annotation is None and argument.arg.lstrip("_") not in ("self", "cls"):
                yield f"{inside}{node.name}: {argument.arg}"
        if node.returns is None and node.name != "__init__":
            yield f"{inside}{node.name}: what it returns"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_of_every_file_are_annotated(path):
    assert not list(missing(ast.parse(path.read_text()).body))


def test_missing_annotations_are_found():
    source = "class A:\n    def f(self, x, *y: int): ...\n    def _g(self, x): ...\nclass _B:\n    def f(x): ...\n"
    assert list(missing(ast.parse(source).body)) == ["A.f: x", "A.f: what it returns"]
    assert not list(missing(ast.parse("def f(x: int) -> None:\n    def g(y): ...").body))
    assert not list(missing(ast.parse("@triton.jit\ndef f(x_ptr): ...\n@kernel(a=[])\ndef g(x_ptr): ...").body))
    assert list(missing(ast.parse("@kernels\ndef f() -> None: ...\n@cache\ndef g(x: int): ...").body)) == ["g: what it returns"]
