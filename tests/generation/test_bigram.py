"""A decoder without layers: the next token depends on the last one alone, and training finds out how."""

import math
from collections import Counter

import pytest
import torch

from fastgpt import GPT, GPTConfig, generate, run_with_cache
from fastgpt.cache.create import CACHE_KINDS

TEXT = (
    "She sells sea shells by the sea shore; the shells she sells are surely seashells. "
    "So if she sells shells on the seashore, I am sure she sells seashore shells. "
) * 3  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A bigram model of TEXT, and its tokens."""
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    ids = torch.tensor([[letters.index(letter) for letter in TEXT]])
    model = GPT(GPTConfig(len(letters), 512, 0, 1, 48, position=None, tie_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), ids, loss.item()


@pytest.mark.slow
def test_bigram_model_learns_the_bigrams_of_a_text(trained):
    """The loss is the entropy of a letter given the one before, which no model of that kind can get below."""
    pairs, firsts = Counter(zip(TEXT, TEXT[1:])), Counter(TEXT[:-1])
    entropy = -sum(n * math.log(n / firsts[a]) for (a, b), n in pairs.items()) / (len(TEXT) - 1)
    assert 0.5 < entropy <= trained[2] < 1.02 * entropy


@torch.no_grad()
def test_probabilities_are_frequencies(trained):
    model, ids, _ = trained
    probabilities = model(ids).softmax(-1)[0]
    after = Counter(b for a, b in zip(TEXT, TEXT[1:]) if a == "s")
    for letter, n in after.items():
        frequency = n / after.total()
        at = TEXT.index("s")
        assert abs(probabilities[at, sorted(set(TEXT)).index(letter)].item() - frequency) < 0.05


@torch.no_grad()
def test_the_last_token_alone_decides(trained):
    """At the same place, that is: a matrix product may round its last rows in another way than its first."""
    model, ids, _ = trained
    others = torch.randint(model.config.vocab_size, ids.shape)
    others[0, 3::7] = ids[0, 3::7]
    assert not torch.equal(others, ids) and torch.equal(model(others)[0, 3::7], model(ids)[0, 3::7])


@pytest.mark.parametrize("kind", [kind for kind in CACHE_KINDS if kind != "sliding"])  # no layer has a window
def test_bigram_model_generates(trained, kind):
    model, ids, _ = trained
    options = {"temperature": 1.0, "seed": 0}
    prompts = [ids[0, :5], ids[0, :1]]
    for prompts in (ids[:, :3], [ids[0, :5], ids[0, :1]]):
        cached = generate(model, prompts, 40, cache=kind, **options)
        assert all(map(torch.equal, cached, generate(model, prompts, 40, use_cache=False, **options)))
    letters = sorted(set(TEXT))
    text = "".join(letters[i] for i in cached[0].tolist())
    assert sum(pair in set(zip(TEXT, TEXT[1:])) for pair in zip(text, text[1:])) > 0.9 * (len(text) - 1)


def test_bigram_model_is_saved_and_inspected(trained, tmp_path):
    model, ids, _ = trained
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    logits, activations = run_with_cache(again, ids)
    assert again.config == model.config and torch.equal(logits, model(ids)) and list(activations) == ["embedding", "norm"]
