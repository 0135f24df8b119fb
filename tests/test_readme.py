"""README and the pages of machines show what is under benchmarks/results/, and README's Python runs."""

import re
from pathlib import Path

import pytest
from architectures import named_cache

from benchmarks import pages, plots, report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


STALE = "is stale: run python -m benchmarks.report"


def test_figures_are_those_of_the_results():
    assert report.rendered(README) == README, f"README.md {STALE}"


@pytest.mark.parametrize("folder", report.machines(), ids=lambda folder: folder.name)
def test_page_and_plots_of_a_machine_are_those_of_its_results(folder):
    page = folder / "README.md"
    assert page.read_text() == pages.page(folder, pages.results_in(folder)), f"{page} {STALE}"
    assert not plots.stale(folder), f"{plots.stale(folder)} {STALE}"


def test_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda code: code[:30])
def test_python_runs(code, capsys):
    (name,) = named_cache(None)  # of the installed transformers, as README's comment has it
    exec(code.replace("cache=ft.Cache", f"{name}=ft.Cache"), {})
    assert capsys.readouterr().out.strip()


def test_paths_exist():
    for path in re.findall(r"`((?:fastgpt|tests|csrc|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
