"""The examples run, and show what they say."""

import runpy
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt.integrations import transformers as ft

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {  # the end of what each prints, or a part of it
    "attention_in_a_module": "step 30: loss",
    "cache_by_hand": "differ by at most",
    "generate_from_checkpoint": "as transformers generates them",
    "number_words": "numbers that it was not trained on are right",
    "search_by_meaning": "4 embeddings, the means of transformers' states: (4, 64)",
    "switch_transformers": "same tokens",
    "test_your_kernel": "a mask that is off by one: plain, torch.float32: out: error",
}

SLOW = {"test_your_kernel", "generate_from_checkpoint", "search_by_meaning", "number_words"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with arguments, as a command does; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    ft.unregister()


NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in NAMES])
def test_examples(name, run):
    assert SHOWN[name] in run(name)


def test_training_learns(run):
    losses = [float(line.split()[-1]) for line in run("attention_in_a_module").splitlines()]
    assert losses[0] > 2 and losses[-1] < 0.2


@pytest.mark.slow
def test_translating_learns(run):
    assert int(run("number_words").splitlines()[-1].split()[0]) >= 90


@pytest.mark.slow
def test_generating_from_a_saved_checkpoint(run):
    assert run("generate_from_checkpoint", str(fastgpt.SHIPPED_MODEL), "ROMEO:").strip()
