"""Prompts, what transformers makes of them, and rows that end."""

import torch
from models import random_ids, random_model


def prompts_of(*lengths):
    return [random_ids(random_model(), 1, length, seed=length)[0].tolist() for length in lengths]


def generated_by_transformers(model, prompts, new, **options):
    """New tokens of each prompt; the batch is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[:, longest:]


def scored(model, prompt, row):
    """The log-probabilities of the tokens that follow the prompt in a row, in one pass."""
    return model(row[None])[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[len(prompt) :, None])[:, 0]


def cut(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
