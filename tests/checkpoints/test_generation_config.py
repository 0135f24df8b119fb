"""generation_config.json: what a checkpoint says about generation."""

import json

import pytest
from checkpoint_files import raises
from models import random_model

from fastgpt import GPT, generate


def test_generation_defaults_are_read_and_saved(folder, tmp_path):
    assert GPT.from_pretrained(folder).generation_defaults == {}
    stored = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "eos_token_id": [2, 3], "bos_token_id": 1, "max_new_tokens": 7,
        "repetition_penalty": 1.1, "transformers_version": "4.40.0", "min_p": 0.05, "max_length": 20,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(stored))
    expected = {
        "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "eos": [2, 3], "max_new_tokens": 7, "repetition_penalty": 1.1,
    }  # fmt: skip
    model = GPT.from_pretrained(folder)
    assert model.generation_defaults == expected
    options = model.generation_defaults | {"seed": 1}
    assert len(generate(model, [[4, 5]], **options)) == 1  # they are names of its options
    model.save_pretrained(tmp_path / "again")
    again = GPT.from_pretrained(tmp_path / "again")
    assert again.generation_defaults == expected
    random_model().save_pretrained(tmp_path / "again")  # over it
    assert GPT.from_pretrained(tmp_path / "again").generation_defaults == {}


@pytest.mark.parametrize(
    "stored, expected",
    [
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"top_k": 0, "top_p": None, "eos_token_id": 2}, {"eos": [2]}),
        ({"eos_token_id": None, "_from_model_config": True}, {}),
    ],
)
def test_generation_defaults(stored, expected, folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps(stored))
    model = GPT.from_pretrained(folder)
    assert model.generation_defaults == expected
    model.save_pretrained(tmp_path / "again")
    assert GPT.from_pretrained(tmp_path / "again").generation_defaults == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"temperature": -1}', ": temperature: expected a finite number >= 0 or None, got -1$"),
        ('{"temperature": "hot"}', ": temperature: expected a finite number >= 0 or None, got 'hot'$"),
        ('{"repetition_penalty": 1e308}', ": repetition_penalty: expected a finite number >= 1e-100 .*, got 1e\\+308$"),
        ('{"top_k": 1.5}', ": top_k: expected an integer >= 0 .*, got 1.5$"),
        ('{"eos_token_id": [2, "x"]}', r": eos_token_id\[1\]: expected an integer .*, got 'x'$"),
        ('{"do_sample": 1}', ": do_sample: expected a bool, got 1$"),
        ('{"top_p": NaN}', ": top_p: expected a finite number, got nan$"),
        ("[1, 2", " is damaged: expected a JSON object"),
    ],
)
def test_a_wrong_generation_config_is_named(text, message, folder):
    (folder / "generation_config.json").write_text(text)
    with raises("model: .*generation_config.json" + message):
        GPT.from_pretrained(folder)


def test_wrong_defaults_are_not_saved(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    for name, value in (("temperature", "hot"), ("nonsense", 1)):
        model.generation_defaults = {name: value}
        with raises(f"^generation_defaults.{name}: expected"):
            model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
