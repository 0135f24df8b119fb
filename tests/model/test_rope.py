"""Tables of positions: as long as passes need them, and always of the caller's own kind."""

import threading

import pytest
import torch
from models import random_ids, random_model
from tape import graphs_on_cpu

from fastgpt import generate
from fastgpt.model.rope import Rope, Tables

LONG = Rope(16, kind="longrope", original_context=20, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)
POSITIONS = {
    "rotary": {"position": "rotary", "rope": Rope(16)},
    "yarn": {"position": "rotary", "rope": Rope(16, kind="yarn", factor=4.0, original_context=32)},
    "longrope": {"position": "rotary", "rope": LONG},
    "sinusoidal": {"position": "sinusoidal"},
}


def under_meta(model, ids):
    with torch.device("meta"):
        model(ids)


def under_inference_mode(model, ids):
    with torch.inference_mode():
        model(ids)


def under_grad(model, ids):
    def loss(scale):
        return (model(ids) * scale).sum()

    torch.func.grad(loss)(torch.tensor(2.0))


def under_another_default(model, ids):
    torch.set_default_dtype(torch.float64)
    try:
        model(ids)
    finally:
        torch.set_default_dtype(torch.float32)


def exported(model, ids):
    torch.export.export(model, (ids,))


MODES = [under_meta, under_inference_mode, under_grad, under_another_default, exported]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("position", ["longrope", "sinusoidal"])
def test_tables_made_in_one_mode_are_not_seen_in_others(position, mode):
    """First calls in a mode, then ones without it, with gradients: the values of a model that saw no mode."""
    model = random_model(layers=1, context=40, **POSITIONS[position])
    ids = random_ids(model, 2, 30)
    mode(model, ids)
    untouched = random_model(layers=1, context=40, **POSITIONS[position])
    logits = model(ids)
    assert type(logits) is torch.Tensor and torch.equal(logits, untouched(ids))
    logits.sum().backward()
    assert torch.equal(generate(model, ids[:, :9], 8), generate(untouched, ids[:, :9], 8))
    mode(model, ids)  # and the other way around


@pytest.mark.parametrize("position", POSITIONS)
def test_tables_grow_as_they_are_used(position, monkeypatch):
    """Steps go on through it, recorded or in a graph, and rows keep their bits."""
    monkeypatch.setattr(Tables, "LEAST", 4)
    model = random_model(**POSITIONS[position])
    ids = random_ids(model, 1, 5)
    expected = generate(random_model(**POSITIONS[position]), ids, 40, use_cache=False)
    assert torch.equal(generate(model, ids, 40), expected)
    with graphs_on_cpu():
        assert torch.equal(generate(model, ids, 40), expected)
    for (_, *keys), tables in model.tables.held.items():
        whole = model.tables.make(model.config.context_length, *keys)
        assert len(tables[0]) in (32, 64) and all(torch.equal(x, y[: len(x)]) for x, y in zip(tables, whole))


def test_a_million_tokens_of_context_cost_nothing_until_they_are_used():
    model = random_model(layers=1, context=1_000_000, position="rotary", rope=Rope(16))
    generate(model, random_ids(model, 1, 5), 4)
    (tables,) = model.tables.held.values()
    assert all(len(table) == Tables.LEAST for table in tables)
    assert len(model.tables(999_999, torch.zeros(1))[0]) == 1_000_000


def test_threads_share_rope_tables():
    model = random_model(layers=1, position="rotary", rope=Rope(16))
    ids, results = random_ids(model, 1, 50), []
    threads = [threading.Thread(target=lambda: results.append(model(ids))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, model(ids)) for result in results)
