"""Small decoders with random weights, for tests."""

import contextlib
from unittest import mock

import torch

from fastgpt import (
    GPT,
    Encoder,
    EncoderConfig,
    GPTConfig,
    attention_reference,
    attention_with_kv_cache_reference,
    linear_reference,
)
from fastgpt.cache import base, uncached
from fastgpt.model import decoder, encoder_states, layers


def random_model(*, layers=2, heads=4, width=64, context=96, vocabulary=65, seed=0, **fields) -> GPT:
    """In evaluation mode. The blocks' weights are large, so that greedy tokens depend on the context and vary."""
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=vocabulary,
        context_length=context,
        num_layers=layers,
        num_heads=heads,
        hidden_size=width,
        **fields,
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(15)
    return model


def random_encoder(*, layers=2, heads=4, width=64, context=96, vocabulary=65, seed=0, **fields) -> Encoder:
    """In evaluation mode, with large weights as those of `random_model`; norms and biases count."""
    torch.manual_seed(seed)
    fields = {"token_types": 2, "masked_head": True, "norm_eps": 1e-5} | fields
    model = Encoder(EncoderConfig(vocabulary, context, layers, heads, width, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_ids(model: GPT | Encoder, batch: int, tokens: int, seed=1) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def reference_operations():
    """Within it, decoders compute by the references: what an error in low precision is measured against."""
    with (
        mock.patch.object(decoder, "linear", linear_reference),
        mock.patch.object(layers, "linear", linear_reference),
        mock.patch.object(base, "attention", attention_reference),
        mock.patch.object(uncached, "attention", attention_reference),
        mock.patch.object(base, "attention_with_kv_cache", attention_with_kv_cache_reference),
        mock.patch.object(encoder_states, "attention", attention_reference),
    ):
        yield
