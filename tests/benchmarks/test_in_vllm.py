"""How the suite `throughput` talks to vLLM, with a module in its place that answers with numbers of its own."""

import sys

import pytest
import torch

pytest.importorskip("transformers", exc_type=ImportError)

import fastgpt  # noqa: E402
from benchmarks import test_throughput  # noqa: E402

VLLM = """
import os
from types import SimpleNamespace as Of

class SamplingParams(Of):
    pass

class LLM:
    def __init__(self, folder, **options):
        assert options["dtype"] == "float32"
        assert os.path.exists(folder + "/config.json") and os.environ["OMP_NUM_THREADS"].isdigit()
        print("a message")
        if os.environ.get("FASTGPT_VLLM"):
            raise ValueError("no such backend")

    def generate(self, prompts, params, use_tqdm):
        ids = [range(prompt["prompt_token_ids"][0], prompt["prompt_token_ids"][0] + of.max_tokens) for prompt, of in zip(prompts, params)]
        return [Of(outputs=[Of(token_ids=list(row))]) for row in ids]
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(VLLM)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(test_throughput, "VLLM", python)
    torch.manual_seed(0)
    config = fastgpt.GPTConfig(vocab_size=64, context_length=32, num_layers=1, hidden_size=32, num_heads=2)
    return fastgpt.GPT(config).eval()


def test_requests_of_a_name_are_answered(model):
    requests = {"a": {"prompts": [[3, 4], [7]], "new": [2, 1]}, "b": {"prompts": [[5]], "new": [3]}}
    with test_throughput.in_vllm(model, requests) as answer:
        assert answer("a")[0] == [[3, 4], [7]]
        answers, seconds = answer("b")
    assert answers == [[5, 6, 7]] and seconds >= 0


def test_what_stops_vllm_is_told(model):
    with test_throughput.in_vllm(model, {"a": {"prompts": [[3]], "new": [2]}}, FASTGPT_VLLM="1") as answer:
        with pytest.raises(RuntimeError, match="ValueError: no such backend"):
            answer("a")


def test_an_environment_without_vllm_is_told(model, monkeypatch, tmp_path):
    monkeypatch.setattr(test_throughput, "VLLM", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="make vllm"), test_throughput.in_vllm(model, {}):
        pass
