"""The libraries that generation is compared with do what the decoder does, and one that does not is found out."""

import copy

import pytest
import torch

from benchmarks import peers
from fastgpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    return peers.randomised(GPT(GPTConfig(vocab_size=97, context_length=64, num_layers=3, num_heads=4, hidden_size=64)))


def test_installed_peers_generate(model):
    ids = torch.arange(16).view(1, 16)
    with peers.opened(model, model) as (there, versions, absent):
        assert all(reason.startswith(("ModuleNotFoundError", "ImportError")) for reason in absent.values()), absent
        assert {"ours", "transformers, dynamic cache"} <= there.keys() and "transformers" in versions
        for name, peer in there.items():
            tokens, seconds = peers.timed(peer, ids)
            assert len(tokens) == len(seconds) == (2 if name == "transformers, no cache" else peers.NEW)
            assert 0 < seconds[0] and seconds == sorted(seconds)
            assert peers.regret(model, ids, tokens) <= 2 * peer.tolerance
            if not name.startswith("llama.cpp"):
                pair = torch.cat([ids, ids + 40])
                tokens, _ = peers.timed(peer, pair)
                assert peers.regret(model, pair, tokens) <= 2 * peer.tolerance


@pytest.mark.parametrize(
    "fault",
    [
        lambda model: model.blocks[1].mlp.up.bias.zero_(),
        lambda model: model.blocks[1].attention_norm.weight.fill_(1),
        lambda model: model.position_embedding.weight.copy_(model.position_embedding.weight.roll(1, 0)),
        lambda model: model.blocks[2].attention.out.weight.copy_(model.blocks[2].attention.out.weight.roll(16, 1)),
    ],
    ids=["a bias is missing", "a gain is missing", "positions off by one", "heads in another order"],
)
def test_a_peer_of_another_model_is_absent(model, fault):
    other = copy.deepcopy(model)
    with torch.no_grad():
        fault(other)
    with peers.opened(model, other) as (there, _, absent):
        assert "off by" in absent["transformers, dynamic cache"]
        assert not [name for name in there if name != "ours" and there[name].tolerance < 0.1]


def test_regret_is_that_of_the_worst_token(model):
    ids = torch.arange(16).view(2, 8)
    tokens, _ = peers.timed(peers.ours(model), ids)
    assert peers.regret(model, ids, tokens) <= 1e-5
    tokens[5][1] = (tokens[5][1] + 1) % 97
    assert peers.regret(model, ids, tokens) > 0.1


def test_work_of_one_token(model):
    """Of a prompt of one token: two FLOPs a weight, and one key in each layer. A step reads every matrix and its cache."""
    weights = sum(x.numel() for name, x in model.named_parameters() if x.dim() == 2 and "position" not in name)
    layers, width = model.config.num_layers, model.config.hidden_size
    assert peers.prefill_flops(model.config, 1) == 2 * weights + 4 * layers * width
    kept = model.new_cache(2, capacity=10).nbytes
    assert peers.step_bytes(model.config, 10, peers.ours(model), batch=2) == 4 * weights + kept
