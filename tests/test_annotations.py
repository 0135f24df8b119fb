"""Public functions say the types of what they take and return."""

import inspect

import pytest

import fastgpt
import fastgpt.testing


def functions():
    """Of the public names and their classes' public methods: (name, function)."""
    for module in (fastgpt, fastgpt.testing):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for attribute, method in vars(value).items():
                    if inspect.isfunction(method) and (not attribute.startswith("_") or attribute in ("__init__", "__call__")):
                        yield f"{module.__name__}.{name}.{attribute}", method


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in functions()])
def test_all_is_annotated(function):
    """But for *args and **kwargs, which go on to somewhere that is."""
    signature = inspect.signature(function)
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = [p for p in signature.parameters.values() if p.name != "self" and p.kind not in several]
    assert not [p.name for p in parameters if p.annotation is p.empty]
    assert signature.return_annotation is not signature.empty
