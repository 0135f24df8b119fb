"""Models that several files compare or generate with."""

import pytest
import transformers
from generation_cases import prompts_of
from models import random_model

from fastgpt import generate


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A model, and transformers' own of the same weights."""
    folder = tmp_path_factory.mktemp("model")
    model = random_model(layers=3, context=128)
    model.save_pretrained(folder)
    return model, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ending():
    """A model, prompts of different lengths, what follows on them without an end, and a token that ends only some of them."""
    model = random_model()
    prompts = prompts_of(3, 9, 5, 2)
    free = [row[len(prompt) :].tolist() for prompt, row in zip(prompts, generate(model, prompts, 30))]
    eos = next(token for token in free[0] if 0 < sum(token in row for row in free) < 4 and free[0].index(token) > 2)
    return model, prompts, free, eos
