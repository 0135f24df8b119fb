"""README, docs/ and the pages of machines show what is under benchmarks/results/, and what they tell one to run does run."""

import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from architectures import named_cache

import fastgpt
import fastgpt.testing
from benchmarks import pages, plots, report
from fastgpt.cli.main import parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in report.DOCUMENTS}
STALE = "is stale: run python -m benchmarks.report"
FENCED = re.compile(r"(<!-- not run: .*? -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(name, *match.groups()) for name, text in DOCUMENTS.items() for match in FENCED.finditer(text)]
PYTHON = [
    pytest.param(code, mark is None, id=f"{name}:{DOCUMENTS[name][: DOCUMENTS[name].index(code)].count(chr(10))}")
    for name, mark, language, code in BLOCKS
    if language == "python"
]
COMMANDS = sorted(
    {line for _, _, language, code in BLOCKS if language == "sh" for line in code.replace("\\\n", "").splitlines()}
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_those_of_the_results(name):
    assert report.rendered(ROOT / name) == DOCUMENTS[name], f"{name} {STALE}"


def test_every_figure_of_the_report_is_shown():
    shown = {marker for text in DOCUMENTS.values() for marker in report.MARKER.findall(text)}
    assert shown == report.sections(ROOT / "README.md").keys()


@pytest.mark.parametrize("folder", report.machines(), ids=lambda folder: folder.name)
def test_page_and_plots_of_a_machine_are_those_of_its_results(folder):
    page = folder / "README.md"
    assert page.read_text() == pages.page(folder, pages.results_in(folder)), f"{page} {STALE}"
    assert not plots.stale(folder), f"{plots.stale(folder)} {STALE}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_lead_somewhere(name):
    text = re.sub(FENCED, "", DOCUMENTS[name])
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"`((?:fastgpt|tests|csrc|benchmarks|docs|examples)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_fits_the_page(name):
    """The site shows about 100 characters; readers would have to scroll to see the rest."""
    blocks = [code for document, _, _, code in BLOCKS if document == name]
    assert not [line for code in blocks for line in code.splitlines() if len(line) > 98]


def test_readme_is_short():
    assert len(DOCUMENTS["README.md"].splitlines()) <= 250


@pytest.mark.parametrize("code, runs", PYTHON)
def test_python_runs(code, runs, capsys):
    """Where a block says `not run`, for want of a network or a GPU, it compiles and its imports run."""
    (cache,) = named_cache(None)  # of the installed transformers, as the comment in the block has it
    code = code.replace("cache=ft.Cache", f"{cache}=ft.Cache")
    tree = ast.parse(code)
    if not runs:
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert tree.body
    exec(compile(tree, "<document>", "exec"), {})
    if runs:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(r"\bfastgpt [a-z]", line)])
def test_commands_have_these_options(line):
    _, _, arguments = line.partition("fastgpt ")
    options, unknown = parser().parse_known_args(shlex.split(arguments, comments=True))
    assert callable(options.run) and not unknown


def test_targets_are_in_the_makefile():
    named = {match[1] for line in COMMANDS if (match := re.match(r"make ([a-z-]+)", line))}
    named |= {name for text in DOCUMENTS.values() for name in re.findall(r"`make ([a-z-]+)", text)}
    assert "test" in named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_api_reference_has_every_public_name():
    text = "\n".join(text for name, text in DOCUMENTS.items() if name.startswith("docs/api/"))
    shown = re.findall(r"^(?:::: |## )(fastgpt[\w.]*)(?: \{.*\})?$", text, re.MULTILINE)
    missing = {f"fastgpt.{name}" for name in fastgpt.__all__} - set(shown)
    assert not missing and {"fastgpt.testing", "fastgpt.integrations.transformers"} <= set(shown)
    for name in shown:
        found, *rest = importlib.import_module("fastgpt"), *name.split(".")[1:]
        for i, part in enumerate(rest):
            if not hasattr(found, part):  # of a module that a function of its name hides, or a module not imported yet
                found = importlib.import_module(".".join(["fastgpt", *rest[:i]]))
            if not hasattr(found, part):
                importlib.import_module(".".join(["fastgpt", *rest[: i + 1]]))
            found = getattr(found, part)


DOCSTRING = """What it does.

    a formula

Args:
    x: (B, T), of which
        some more.
    causal: aligned to the last key:
        T=2  1 1 0
             1 1 1
    impl: a name.

Returns: a number
    of some kind.
Raises: ValueError.

>>> f(1)
2
"""
MARKDOWN = """What it does.

    a formula

**Args:**

- `x`: (B, T), of which
    some more.
- `causal`: aligned to the last key:

    ```text
    T=2  1 1 0
         1 1 1
    ```

- `impl`: a name.

**Returns:** a number
of some kind.

**Raises:** ValueError.

```pycon
>>> f(1)
2
```"""


def test_docstrings_become_markdown(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))  # which only `make docs` installs
    markdown = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["markdown"]
    assert re.sub(r" *\n(\s*\n)+", "\n\n", markdown(DOCSTRING)) == MARKDOWN


def test_a_sentence_that_begins_with_returns_is_no_section(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    markdown = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["markdown"]
    assert markdown("Returns all pages.") == "Returns all pages."


def test_the_reference_names_functions_that_modules_hide():
    """A function with the name of its module is not found among the members of the package."""
    package = importlib.import_module("fastgpt.integrations.transformers")
    hidden = [name for name in package.__all__ if f"{package.__name__}.{name}" in sys.modules]
    text = (ROOT / "docs" / "api" / "integrations.md").read_text()
    assert "optimize" in hidden and all(f"::: {package.__name__}.{name}.{name}\n" in text for name in hidden)
