"""Decoding with models of popular sizes on a GPU: fastgpt and transformers, with the same random weights.

Decode steps are timed by the wall clock, sampling included: ours from one synchronization to the next, with the CUDA graph of
`generate.stream` in between; transformers', which synchronizes in every step, from one token of its streamer to a later one. A
batch is one prompt, prefilled once, whose cache is then repeated: prefilling 64 prompts of 4,096 tokens would take longer than all
else.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.timing import DEVICE, tiny
from fastgpt import GPT, GPTConfig
from fastgpt.bench.timing import clock, synchronize
from fastgpt.generation.generate import stream
from fastgpt.model.rope import Rope

FIRST, ROUNDS = 8, 7  # steps that compile, capture and warm up; and rounds after them
STEPS, THEIR_STEPS = (2, 2) if tiny() else (32, 8)  # in a round
LLAMA = {
    "norm": "rms", "activation": "silu", "gated": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "position": "rotary", "num_heads": 32, "num_kv_heads": 8, "vocab_size": 128256, "context_length": 8192,
}  # fmt: skip
LLAMA3 = {"theta": 5e5, "kind": "llama3", "original_context": 8192}
SHAPES = {
    "gpt2-124m": GPTConfig(50257, context_length=1024, num_layers=12, num_heads=12, hidden_size=768),
    "gpt2-xl": GPTConfig(50257, context_length=1024, num_layers=48, num_heads=25, hidden_size=1600),
    "llama-1b": GPTConfig(
        num_layers=16, hidden_size=2048, intermediate_size=8192, tie_embeddings=True, rope=Rope(64, factor=32.0, **LLAMA3),
        **LLAMA,
    ),
    "llama-8b": GPTConfig(
        num_layers=32, hidden_size=4096, intermediate_size=14336, tie_embeddings=False, rope=Rope(128, factor=8.0, **LLAMA3),
        **LLAMA,
    ),
}  # fmt: skip
DYNAMIC = "transformers, dynamic cache"  # with sdpa, its default, which picks PyTorch's flash attention where that serves
COMPILED, FLASH = "transformers, static cache, compiled", "transformers, flash_attention_2"
CASES = {  # (model, batch, tokens of the prompt) -> targets, the most important case first
    ("gpt2-124m", 1, 128): {"tokens_per_second": 5000, "on": "H200", "times": {DYNAMIC: 10, COMPILED: 2}},
    ("llama-8b", 1, 128): {"of_limit": 0.85},
    ("llama-1b", 1, 128): {"of_limit": 0.75},
    ("gpt2-xl", 1, 128): {"of_limit": 0.65},
    ("llama-1b", 64, 4096): {"times": {DYNAMIC: 3, FLASH: 3}},
    ("llama-8b", 16, 4096): {"times": {DYNAMIC: 3, FLASH: 3}},
    ("llama-8b", 64, 4096): {"times": {DYNAMIC: 3, FLASH: 3}},
    ("llama-1b", 16, 4096): {"times": {DYNAMIC: 3, FLASH: 3}},
}


def shape(name: str) -> GPTConfig:
    """The config of a model; in a dry run one of the same kind with a few thousand weights."""
    config = SHAPES[name]
    if not tiny():
        return config
    heads = {"num_heads": 4, "num_kv_heads": 4 * config.num_kv_heads // config.num_heads, "head_dim": 16, "v_head_dim": None}
    sizes = {"vocab_size": 97, "context_length": 256, "num_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    return dataclasses.replace(config, rope=config.rope and dataclasses.replace(config.rope, dim=16), **heads, **sizes)


@torch.no_grad()
def made(config: GPTConfig, dtype: torch.dtype) -> GPT:
    """A model with random weights, drawn on its device.

    Wider matrices have smaller weights, so that activations have the scale of `peers.gpt2`."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    model = peers.randomised(model.to_empty(device=DEVICE))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("blocks."):
            parameter.mul_((768 / config.hidden_size) ** 0.5)
    return model


def ours(model: GPT, prompt: torch.Tensor, batch: int, **rules) -> tuple[Callable[[], float], list[list[int]]]:
    """A function that decodes for a round and gives the seconds of a step, and the tokens of the first steps, by step.

    prompt: (1, T). rules: `generate`'s, of how a token is chosen.
    """
    tokens = stream(model, prompt, FIRST + STEPS * ROUNDS, num_samples=batch, **rules)
    first = [token.clone() for token in itertools.islice(tokens, FIRST)]

    def seconds_of_a_step():
        return clock(lambda: next(tokens), [{}] * STEPS, DEVICE)

    return seconds_of_a_step, [token.tolist() for token in first]


@torch.no_grad()
def theirs(
    model, prompt: torch.Tensor, batch: int, implementation: str = "sdpa", **options
) -> tuple[list[float], list[list[int]]]:
    """The seconds of a step in each round of transformers' `generate`, and the tokens of the first steps."""
    import transformers

    model.set_attn_implementation(implementation)
    if "cache_implementation" not in options:
        cache = options["past_key_values"] = transformers.DynamicCache()
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(batch)
    ids, at, tokens = prompt.expand(batch, -1), [], []

    def note(step):
        at.append(time.perf_counter())
        tokens.append(step)

    new = FIRST + THEIR_STEPS * ROUNDS
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=peers.streamer(note), **options)
    synchronize(DEVICE)
    if len(at) != new:
        raise RuntimeError(f"it handed over {len(at)} of {new} steps")
    ends = at[FIRST - 1 :: THEIR_STEPS]
    return [(end - start) / THEIR_STEPS for start, end in zip(ends, ends[1:])], tokens[:FIRST]
