"""Inspection of a decoder: its activations by name, the most likely next tokens, plots of attention patterns."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt.cache.uncached import Uncached
from fastgpt.checks import require_path, shown, writing
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_states import EncoderKV, uncached
from fastgpt.model.inputs import require_decoder
from fastgpt.ops.attention import attention_reference


def run_with_cache(
    model: GPT,
    ids: torch.Tensor,
    *,
    lengths: torch.Tensor | Sequence[int] | None = None,
    encoder_states: torch.Tensor | None = None,
    encoder_lengths: torch.Tensor | Sequence[int] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Computes logits and collects the activations: a dict by name, in the order of computation.

        embedding                   (B, T, C)        input of the first block: token plus position embedding
        blocks.0.attention.q        (B, H, T, D)     queries, after q/k norm and rotation
        blocks.0.attention.k        (B, H_kv, T, D)  keys, after q/k norm and rotation
        blocks.0.attention.v        (B, H_kv, T, D)  values
        blocks.0.attention.pattern  (B, H, T, T)     weights of the softmax: [b, h, i, j] from token i to token j; at least fp32
        blocks.0.attention.output   (B, H, T, D)     pattern @ v of each head, before the output projection
        blocks.0.cross_attention.*                   the five of cross-attention, if the model has it, over S encoder states
        blocks.0.middle             (B, T, C)        the residual stream that the MLP reads: after attention, or in a parallel block before it
        blocks.0.output             (B, T, C)        the residual stream after the MLP: input of the next block
        norm                        (B, T, C)        output of the final norm, if the model has one, from which logits are computed

    Query head h attends to key and value head h // (H / H_kv). The logits are those of `model(ids)`; gradients flow where they
    are enabled.

    Args:
        model: the decoder or encoder.
        ids: (B, T) int64 or int32.
        lengths: (B,), a list or a tensor: the number of tokens of each sequence, padded on the right. Default: T.
        encoder_states: (B, S, C), which cross-attention attends to.
        encoder_lengths: (B,), a list or a tensor: the number of encoder states of each sequence. Default: S.

    Returns: logits (B, T, V) and the dict of activations.
    Raises: TypeError, ValueError as `GPT.forward`.

    >>> logits, activations = fastgpt.run_with_cache(model, ids)
    >>> activations["blocks.0.attention.pattern"].shape
    torch.Size([1, 12, 7, 7])
    """
    require_decoder(model)
    activations = {}
    cache = Recorder(activations, uncached(model, ids, lengths, encoder_states, encoder_lengths))
    hooks = []
    for i, block in enumerate(model.blocks):
        hooks.append(block.mlp.register_forward_pre_hook(storing_hook(activations, f"blocks.{i}.middle")))
        hooks.append(block.register_forward_hook(storing_hook(activations, f"blocks.{i}.output")))
    try:
        activations["embedding"] = model.embed(ids, cache)
        hidden = model.run_blocks(activations["embedding"], cache)
    finally:
        for hook in hooks:
            hook.remove()
    activations["norm"] = model.final_norm(hidden)
    return model.logits(hidden), activations


def storing_hook(activations: dict, name: str) -> Callable:
    """A forward hook that stores the output of a module, or as a forward pre-hook its input."""

    def hook(module, inputs, output=None):
        activations[name] = inputs[0] if output is None else output

    return hook


class Recorder(Uncached):
    """An Uncached that records queries, keys, values, outputs and the attention pattern, which kernels never materialize."""

    def __init__(self, activations: dict, plain: Uncached):
        super().__init__(plain.window, plain.device, causal=plain.causal, lengths=plain.lengths)
        self.activations = activations
        self.encoder_kv = None if plain.encoder_kv is None else EncoderKVRecorder(activations, plain.encoder_kv)

    def attend_rotated(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        output = super().attend_rotated(layer, q, k, v, **options)
        record_attention(self.activations, f"blocks.{layer}.attention", q, k, v, output, **options)
        return output


class EncoderKVRecorder(EncoderKV):
    """An EncoderKV that records queries, keys, values, outputs and the attention pattern of cross-attention."""

    def __init__(self, activations: dict, plain: EncoderKV):
        super().__init__(plain.layers, plain.batch_size, plain.lengths)
        self.activations = activations

    def attend(self, layer: int, q: torch.Tensor, **options) -> torch.Tensor:
        output = super().attend(layer, q, **options)
        visible = {"causal": False, "kv_lengths": self.lengths}
        name = f"blocks.{layer}.cross_attention"
        record_attention(self.activations, name, q, *self.layers[layer], output, **visible, **options)
        return output


def record_attention(
    activations: dict, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, **options
) -> None:
    """Stores one attention. Its pattern is its output with the identity matrix for values."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    identity = torch.eye(k.shape[2], dtype=dtype, device=k.device).expand(*k.shape[:2], -1, -1)  # (B, H_kv, S, S)
    pattern = attention_reference(q.to(dtype), k.to(dtype), identity, **options)
    for part, value in (("q", q), ("k", k), ("v", v), ("pattern", pattern), ("output", output)):
        activations[f"{name}.{part}"] = value


# Next tokens


def most_likely(logits: torch.Tensor, top: int) -> list[tuple[int, float, float]]:
    """The `top` most likely next tokens by logits (V,), most likely first: (token, logit, probability) of each."""
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top: expected an integer >= 1, got {shown(top)}")
    logits = logits.float()
    probabilities = logits.softmax(-1)
    tokens = logits.sort(descending=True, stable=True).indices[:top]  # the first is that of argmax
    return [(token, logits[token].item(), probabilities[token].item()) for token in tokens.tolist()]


def text_of(tokenizer: Any, token: int, before: int | None = None) -> str:
    """The text of a token after the one before it; its name in the vocabulary if that is empty or no whole characters."""
    prefix = "" if before is None else tokenizer.decode([before])
    text = tokenizer.decode([token] if before is None else [before, token])
    text = text.removeprefix(prefix) if text.startswith(prefix) else tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    return tokenizer.backend.id_to_token(token) or f"<token {token}>"


# Plots

INCHES, LARGEST = 0.24, 14.0  # inches for each token, and the most for a side of the plot
LABELS, LONGEST = 60, 16  # the most labels of an axis, and characters of a label


def draw_attention(pattern: torch.Tensor, tokens: list[str], path: str | Path, title: str = "") -> None:
    """Plots an attention pattern (T, S) to a file: a row for each query, dark where it attends.

    Args:
        pattern: weights (T, S) of one head.
        tokens: the text of the S keys; the queries are the last T of them.
        path: the file, whose extension selects the format: .png, .svg, .pdf, ...
        title: above the plot.

    Raises: ImportError without matplotlib; ValueError for an unknown format; OSError that names the file.
    """
    path = require_path("path", path)
    if not path.suffix:  # matplotlib would add one, and write to another file
        raise ValueError(f"attention: expected a file name that ends with its format, such as .png, got {path}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plotting needs matplotlib, which is not installed: pip install matplotlib") from error
    T, S = pattern.shape
    if len(tokens) != S:
        raise ValueError(f"tokens: expected {S}, one for each column of the pattern, got {len(tokens)}")
    width, height = (min(INCHES * n, LARGEST) for n in (S, T))
    figure = Figure(figsize=(max(width, 2.4) + 2.6, max(height, 2.4) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(pattern.detach().float().cpu().numpy(), cmap="Blues", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.6)
    # Escaped, with spaces visible; nothing is parsed as a formula.
    labels = [repr(token)[1:-1].replace(" ", "\u2423") for token in tokens]
    labels = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "\u2026" for label in labels]
    for axis, n, name in ((axes.xaxis, S, "key"), (axes.yaxis, T, "query")):
        step = -(-n // LABELS)
        axis.set_ticks(range(0, n, step), labels[S - n :: step], parse_math=False, fontsize=8)
        axis.set_label_text(name)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    if max(map(len, labels)) > 2:
        axes.tick_params(axis="x", rotation=90)
    axes.set_title(title, fontsize=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        try:
            with writing("attention", path, "a file"):
                figure.savefig(path, dpi=150)
        except ValueError as error:
            raise ValueError(f"attention: expected a file format that matplotlib supports, got {path}: {error}") from error
