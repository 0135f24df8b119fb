"""Generation: `generate`; `stream`, which yields tokens as they come; `generate_each`, which yields rows as they end."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fastgpt.checks import listed, require_flag
from fastgpt.generation.config import GenerationConfig, integers
from fastgpt.generation.many import Many, is_many
from fastgpt.generation.request import Request
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_decoder import EncoderDecoder
from fastgpt.model.encoder_states import read_encoder_states
from fastgpt.model.inputs import require_decoder


def generate(
    model: GPT | EncoderDecoder,
    ids: torch.Tensor | np.ndarray | Iterable,
    max_new_tokens: int | Sequence[int] | None = None,
    *,
    encoder_states: torch.Tensor | None = None,
    encoder_lengths: torch.Tensor | Sequence[int] | None = None,
    progress: bool = False,
    **options,
) -> torch.Tensor | list[torch.Tensor] | tuple:
    """Continues each sequence by `max_new_tokens` tokens, or up to a token that ends it; of an encoder-decoder, the output of each
    input, which begins with its start token.

    Args:
        model: a decoder, or an `EncoderDecoder`, whose inputs are ids.
        ids: (B, T) int64 token ids, T >= 1, a tensor or an array; or a list or an iterator of B prompts of any length, each
            a list, a 1-d tensor or array of ids.
        max_new_tokens: prompt and new tokens must fit into the model's context. None: as many as the model's checkpoint
            says, or else 300; but no more than fit after the longest prompt. Or a list with a number for each prompt: see
            max_batch in `GenerationConfig`, with which None is what fits after each.
        encoder_states, encoder_lengths: the second stream of a model with cross-attention, one for each prompt: see
            `GPT.forward`. Of an `EncoderDecoder`, encoder_lengths is the number of tokens of each input in a tensor of ids, which
            is padded on the right.
        progress: with many prompts, whether to show a progress bar on standard error.
        options: see `GenerationConfig`. Those that are not passed have the defaults of the model's checkpoint: if it names eos
            tokens, they end rows here, too, unless eos says otherwise; eos=() ignores them.

    Returns: (B · num_samples, T + n) int64, the prompt included (of an encoder-decoder that is the start token), samples of a prompt one after the other; n is
        max_new_tokens or the length of the longest row, and shorter rows are padded with the (first) eos. For a list of
        prompts, a list of 1-d tensors without padding.
        With return_logprobs also the log-probabilities of the new tokens, fp32: (B · num_samples, n), 0 where rows are
        padded; or a list of 1-d tensors.
    Raises: TypeError, ValueError, naming the argument; ValueError where logits are NaN or infinite, or rules forbid every
        token, with the row and the step. Ctrl-C among many prompts raises `fastgpt.Interrupted`, a KeyboardInterrupt with the rows
        that are done.
    """
    require_model(model)
    prompts: Any = listed(ids)
    require_flag("progress", progress)
    config = GenerationConfig.of(model, options)
    if is_many(model, prompts, max_new_tokens, config):
        if not model.config.cross_attention:
            read_encoder_states(model, encoder_states, encoder_lengths)  # raises for any
        results = Many(model, prompts, max_new_tokens, config).finish(progress)
        columns: list[Any] = list(zip(*results)) if config.return_logprobs else [results]
        if isinstance(prompts, (torch.Tensor, np.ndarray)):
            padding = [*integers("eos", config.eos or 0)[:1], 0.0]
            columns = [pad_sequence(list(rows), True, value) for rows, value in zip(columns, padding)]
        else:
            columns = [list(rows) for rows in columns]
        return tuple(columns) if config.return_logprobs else columns[0]
    request = Request.of(model, prompts, max_new_tokens, config, encoder_states, encoder_lengths)
    for _ in request.run():
        pass
    new, eos = request.sampler.tokens.t(), request.eos  # (B · num_samples, max_new_tokens), -1 where a row has ended
    lengths = (new >= 0).sum(1).tolist()
    table = isinstance(prompts, (torch.Tensor, np.ndarray))
    if table:
        new = new[:, : max(lengths)]
        new = new.where(new >= 0, eos[0]) if eos else new
        tokens: torch.Tensor | list[torch.Tensor] = torch.cat([torch.stack(request.rows), new], dim=1)
    else:
        tokens = [torch.cat([row, more[:n]]) for row, more, n in zip(request.rows, new, lengths)]
    if not request.options.return_logprobs:
        return tokens
    logprobs = request.sampler.logprobs.t()[:, : max(lengths)]
    return tokens, logprobs if table else [row[:n] for row, n in zip(logprobs, lengths)]


def require_model(model: Any) -> None:
    """Raises TypeError for what does not generate."""
    if not isinstance(model, EncoderDecoder):
        require_decoder(model)


def stream(
    model: GPT | EncoderDecoder,
    ids: torch.Tensor | np.ndarray | Iterable,
    max_new_tokens: int | None = None,
    *,
    encoder_states: torch.Tensor | None = None,
    encoder_lengths: torch.Tensor | Sequence[int] | None = None,
    **options,
) -> Iterator[torch.Tensor]:
    """Yields the next token of each sequence, (B · num_samples,) int64, as soon as it is known; -1 for those that have ended.

    With return_logprobs, yields pairs of that and of the log-probabilities (B · num_samples,) fp32. It ends when all
    sequences have. On a GPU this is seen at every 16th step only: the last ones may be -1 throughout, and logits that are not
    finite raise then; until then they give any tokens.

    Arguments, their defaults and errors are those of `generate`; bad input raises here, not at the first token.
    """
    require_model(model)
    prompts: Any = listed(ids)
    config = GenerationConfig.of(model, options)
    return Request.of(model, prompts, max_new_tokens, config, encoder_states, encoder_lengths).stream()


def generate_each(
    model: GPT,
    ids: torch.Tensor | np.ndarray | Iterable,
    max_new_tokens: int | Sequence[int] | None = None,
    *,
    progress: bool = False,
    **options,
) -> Iterator[tuple]:
    """Yields each row of `generate` when it has ended, as rows join and leave a batch: its number and its tokens (T + n,) int64,
    prompt included; with return_logprobs also the log-probabilities (n,) fp32 of the new ones.

    Rows are numbered as in the result of `generate`. Arguments, their defaults and errors are those of `generate` with max_batch;
    bad input raises here, not at the first row.
    """
    require_model(model)
    prompts: Any = listed(ids)
    require_flag("progress", progress)
    many = Many(model, prompts, max_new_tokens, GenerationConfig.of(model, options))
    results = ((row.index, many.result(row)) for row in many.run(progress))
    return ((index, *result) if many.options.return_logprobs else (index, result) for index, result in results)
