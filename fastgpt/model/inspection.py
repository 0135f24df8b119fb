"""Looking inside a decoder: every number on the way from tokens to logits by its name, and pictures of attention."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt.cache.uncached import Uncached
from fastgpt.checks import require_path, writing
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder_states import EncoderKV, uncached
from fastgpt.ops.attention import attention_reference


def run_with_cache(
    model: GPT,
    ids: torch.Tensor,
    *,
    lengths: torch.Tensor | Sequence[int] | None = None,
    encoder_states: torch.Tensor | None = None,
    encoder_lengths: torch.Tensor | Sequence[int] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of ids (B, T), and the activations on the way to them: a dict by name, in the order of computation.

        embedding                     (B, T, C)     what enters the first block: token and position embedding
        blocks.0.attention.q          (B, H, T, D)  queries, as they are multiplied with keys: after q/k norm and rotation
        blocks.0.attention.k          (B, H_kv, T, D)  keys, likewise
        blocks.0.attention.v          (B, H_kv, T, D)  values
        blocks.0.attention.pattern    (B, H, T, T)  weights [b, h, i, j] with which token i attends to token j: rows of sum 1,
                                                    after scale, soft cap, causal mask and window; at least fp32
        blocks.0.attention.output     (B, H, T, D)  pattern @ v of each head, before the output matrix
        blocks.0.cross_attention.*                  the same over a second stream, of a model with cross-attention: S keys
        blocks.0.middle               (B, T, C)     the residual stream between attention and MLP
        blocks.0.output               (B, T, C)     and after the MLP: what enters the next block
        norm                          (B, T, C)     the last block's output through the final norm: what makes the logits

    Query head h attends to key and value head h // (H / H_kv). Arguments and errors are those of `GPT.forward`. The logits
    are those of `model(ids)`; gradients flow, where they are enabled.

    >>> logits, activations = fastgpt.run_with_cache(model, ids)
    >>> activations["blocks.0.attention.pattern"].shape
    torch.Size([1, 12, 7, 7])
    """
    activations = {}
    cache = Recorder(activations, uncached(model, ids, lengths, encoder_states, encoder_lengths))
    hooks = []
    for i, block in enumerate(model.blocks):
        hooks.append(block.mlp.register_forward_pre_hook(keeping(activations, f"blocks.{i}.middle")))
        hooks.append(block.register_forward_hook(keeping(activations, f"blocks.{i}.output")))
    try:
        activations["embedding"] = model.embed(ids, cache)
        hidden = model.run_blocks(activations["embedding"], cache)
    finally:
        for hook in hooks:
            hook.remove()
    activations["norm"] = model.norm(hidden)
    return model.logits(hidden), activations


def keeping(activations: dict, name: str):
    """A hook before or after a module that keeps what goes in or comes out."""

    def hook(module, inputs, output=None):
        activations[name] = inputs[0] if output is None else output

    return hook


class Recorder(Uncached):
    """An Uncached that keeps what goes through it, and the pattern, which the kernels never hold."""

    def __init__(self, activations: dict, plain: Uncached):
        super().__init__(plain.window, plain.device, causal=plain.causal, lengths=plain.lengths)
        self.activations = activations
        self.encoder_kv = None if plain.encoder_kv is None else EncoderKVRecorder(activations, plain.encoder_kv)

    def attend_rotated(self, layer, q, k, v, **options):
        output = super().attend_rotated(layer, q, k, v, **options)
        keep_attention(self.activations, f"blocks.{layer}.attention", q, k, v, output, **options)
        return output


class EncoderKVRecorder(EncoderKV):
    """A EncoderKV that does."""

    def __init__(self, activations: dict, plain: EncoderKV):
        super().__init__(plain.layers, plain.batch_size, plain.lengths)
        self.activations = activations

    def attend(self, layer, q, **options):
        output = super().attend(layer, q, **options)
        visible = {"causal": False, "kv_lengths": self.lengths}
        name = f"blocks.{layer}.cross_attention"
        keep_attention(self.activations, name, q, *self.layers[layer], output, **visible, **options)
        return output


def keep_attention(activations: dict, name: str, q, k, v, output, **options) -> None:
    """Keeps what one attention did, and its pattern: the output that it has for values which are unit vectors."""
    wide = torch.promote_types(q.dtype, torch.float32)
    units = torch.eye(k.shape[2], dtype=wide, device=k.device).expand(*k.shape[:2], -1, -1)
    pattern = attention_reference(q.to(wide), k.to(wide), units, **options)
    for part, value in (("q", q), ("k", k), ("v", v), ("pattern", pattern), ("output", output)):
        activations[f"{name}.{part}"] = value


# What comes next


def likeliest(logits: torch.Tensor, top: int) -> list[tuple[int, float, float]]:
    """The `top` most likely tokens by logits (V,), likeliest first: token, logit and probability of each."""
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top: expected an integer >= 1, got {top!r}")
    logits = logits.float()
    probabilities = logits.softmax(-1)
    tokens = logits.sort(descending=True, stable=True).indices[:top]  # the first is that of argmax
    return [(token, logits[token].item(), probabilities[token].item()) for token in tokens.tolist()]


def text_of(tokenizer, token: int, before: int | None = None) -> str:
    """What a token adds to the one before it: its text, or its name where that is not whole characters, or none at all."""
    prefix = "" if before is None else tokenizer.decode([before])
    text = tokenizer.decode([token] if before is None else [before, token])
    text = text.removeprefix(prefix) if text.startswith(prefix) else tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    return tokenizer.backend.id_to_token(token) or f"<token {token}>"


# Pictures

INCHES, LARGEST = 0.24, 14.0  # a token's side of a picture, if all of it is no larger than so many inches
LABELS, LONGEST = 60, 16  # labels of an axis and characters of a label, at most


def draw_attention(pattern: torch.Tensor, tokens: list[str], path: str | Path, title: str = "") -> None:
    """Saves a picture of a pattern (T, S): a row for each token, dark where it attends.

    Args:
        tokens: the text of each of the S; of the T the last of them.
        path: of the picture, whose ending says the format: .png, .svg, .pdf, ...

    Raises: ImportError without matplotlib; ValueError for a format that it does not know; OSError that names the file.
    """
    path = require_path("path", path)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a picture needs matplotlib, which is not installed: pip install matplotlib") from error
    T, S = pattern.shape
    if len(tokens) != S:
        raise ValueError(f"tokens: expected {S}, as many as the pattern has columns, got {len(tokens)}")
    width, height = (min(INCHES * n, LARGEST) for n in (S, T))
    figure = Figure(figsize=(max(width, 2.4) + 2.6, max(height, 2.4) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(pattern.detach().float().cpu().numpy(), cmap="Blues", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.6)
    # Escaped, and blanks visible; no text is a formula.
    labels = [repr(token)[1:-1].replace(" ", "\u2423") for token in tokens]
    labels = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "\u2026" for label in labels]
    for axis, n, name in ((axes.xaxis, S, "token that is attended to"), (axes.yaxis, T, "token that attends")):
        step = -(-n // LABELS)
        axis.set_ticks(range(0, n, step), labels[S - n :: step], parse_math=False, fontsize=8)
        axis.set_label_text(name)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    if max(map(len, labels)) > 2:
        axes.tick_params(axis="x", rotation=90)
    axes.set_title(title, fontsize=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        try:
            with writing("attention", path, "a file"):
                figure.savefig(path, dpi=150)
        except ValueError as error:
            raise ValueError(f"attention: expected a file of a kind that matplotlib draws, got {path}: {error}") from error
