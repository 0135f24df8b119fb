"""README shows what is under benchmarks/results/, and its Python runs."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "benchmarks", raising=False)
    from benchmarks.report import rendered

    assert rendered(README) == README, "README.md is stale: run python -m benchmarks.report"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda code: code[:30])
def test_python_runs(code, capsys):
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_paths_exist():
    for path in re.findall(r"`((?:fastgpt|tests|csrc|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
