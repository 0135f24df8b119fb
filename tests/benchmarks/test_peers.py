"""The libraries that generation is compared with do what the decoder does, and one that does not is found out."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import peers
from fastgpt import GPT, GPTConfig

GPT2 = GPTConfig(vocab_size=97, context_length=64, num_layers=3, num_heads=4, hidden_size=64)
LLAMA = dataclasses.replace(  # heads of 64: CTranslate2 4.8.5 rotates those of 16 otherwise
    peers.SMOLLM2, vocab_size=97, context_length=64, num_layers=2, num_heads=3, num_kv_heads=1, hidden_size=192,
    intermediate_size=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return peers.randomised(GPT(GPT2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_installed_peers_generate(config, dtype):
    model, oracle = (peers.randomised(GPT(config)).to(dtype) for _ in range(2))
    oracle = oracle.float()
    ids = torch.arange(16).view(1, 16)
    with peers.opened(model, oracle) as (there, versions, absent):
        assert all(reason.startswith(("ModuleNotFoundError", "ImportError")) for reason in absent.values()), absent
        assert {"ours", "transformers, dynamic cache"} <= there.keys() and "transformers" in versions
        for name, peer in there.items():
            tokens, seconds = peers.timed(peer, ids)
            assert len(tokens) == len(seconds) == (2 if name == "transformers, no cache" else peers.NEW)
            assert 0 < seconds[0] and seconds == sorted(seconds)
            assert peers.regret(oracle, ids, tokens) <= 2 * peer.tolerance
            if not name.startswith(("llama.cpp", "OpenVINO")):
                pair = torch.cat([ids, ids + 40])
                tokens, _ = peers.timed(peer, pair)
                assert peers.regret(oracle, pair, tokens) <= 2 * peer.tolerance


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


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_work_of_one_token(config):
    """Of a prompt of one token: two FLOPs a weight, and one key in each layer. A step reads every matrix and its cache."""
    model = GPT(config)
    weights = sum(x.numel() for name, x in model.named_parameters() if x.dim() == 2 and "position" not in name)
    layers, width = model.config.num_layers, model.config.hidden_size
    assert peers.prefill_flops(model.config, 1) == 2 * weights + 4 * layers * width
    kept = model.new_cache(2, capacity=10).nbytes
    assert peers.step_bytes(model.config, 10, peers.ours(model), batch=2) == 4 * weights + kept


def test_tensors_for_llama_cpp_are_those_of_the_checkpoint():
    """Its heads rotate neighbors, ours the halves: two of a pair are as many apart as before, and nothing is lost."""
    config = dataclasses.replace(LLAMA, num_heads=2, num_kv_heads=1, hidden_size=128)
    qkv = np.arange(4 * 64)[:, None] * np.ones((1, 128))
    parts = peers.gguf_parts(config, "attn_qkv", qkv)
    assert {name: part.shape for name, part in parts.items()} == {
        "attn_q": (128, 128),
        "attn_k": (64, 128),
        "attn_v": (64, 128),
    }
    assert parts["attn_q"][:4, 0].tolist() == [0, 32, 1, 33] and parts["attn_q"][64:66, 0].tolist() == [64, 96]
    assert parts["attn_k"][:2, 0].tolist() == [128, 160] and np.array_equal(parts["attn_v"], qkv[192:])
    gate, up = peers.gguf_parts(config, "ffn_up", qkv).values()
    assert np.array_equal(np.concatenate([gate, up]), qkv)
    assert peers.gguf_parts(GPT2, "attn_qkv", qkv).keys() == {"attn_qkv"}
