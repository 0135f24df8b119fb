"""An encoder and its tokenizer: from texts to embeddings, and to words for masked tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastgpt.checkpoints import hub
from fastgpt.checks import require_choice, require_flag, require_integer
from fastgpt.encoding.sentences import Sentences, pooled, read_sentences
from fastgpt.generation.many import Interrupted
from fastgpt.model.encoder import Encoder
from fastgpt.model.evaluation_mode import evaluating, others
from fastgpt.ops.quantized_weight import Quantization
from fastgpt.text.tokenizer import Tokenizer

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Filling:
    """A token for a mask.

    token: its id.
    text: what it stands for, without the space before it.
    probability: of all tokens of the vocabulary.
    filled: the text with it in place of that mask.
    """

    token: int
    text: str
    probability: float
    filled: str


class EncoderPipeline:
    """An encoder, its tokenizer, and how it embeds sentences. `fastgpt.pipeline` makes one from the checkpoint of an encoder.

    model: the `fastgpt.Encoder`.
    tokenizer: the `Tokenizer`.
    sentences: the `fastgpt.encoding.sentences.Sentences`, of sentence-transformers' files in the checkpoint.
    """

    def __init__(self, model: Encoder, tokenizer: Tokenizer, sentences: Sentences | None = None):
        self.model, self.tokenizer, self.sentences = model, tokenizer, sentences or Sentences()

    @classmethod
    def from_pretrained(
        cls, path: str | Path,
        *, revision: str | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        weights: str | Quantization | None = None,
    ) -> "EncoderPipeline":  # fmt: skip
        """Loads the checkpoint of an encoder. Arguments and errors are those of `fastgpt.pipeline`."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = hub.resolve(path, revision)
        model = Encoder.from_pretrained(folder, dtype=dtype, device=device, weights=weights)
        return cls(model, Tokenizer.from_folder(folder), read_sentences(folder))

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most, special ones included."""
        context = self.model.config.context_length
        return min(context, self.sentences.max_tokens or context)

    @torch.no_grad()
    def embed(
        self,
        texts: str | Sequence[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        truncate: bool = False,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """The embeddings of texts. They are sorted by length, and packed into batches without padding.

        Args:
            texts: a text, or a list of any number.
            batch_tokens: tokens of a batch, which has at least one text.
            truncate: texts of more than `max_tokens` tokens lose what is beyond. False: they are an error, before any text is
                embedded.
            pooling: "mean" or "first", as in `Sentences`. Default: the model's.
            normalize: whether embeddings are divided by their length. Default: as the model's files say.
            prompt: the name of one of `sentences.prompts`, which goes before each text. Default: the model's, if it has one.
            progress: whether to show a progress bar on standard error.

        Returns: (B, C) on the device of the model, in fp32 (of fp64 weights, fp64), in the order of texts; of one text, (C,).
        Raises: TypeError, ValueError, naming the argument and the text; `fastgpt.Interrupted`, a KeyboardInterrupt, on Ctrl-C,
            whose `results` has embeddings (C,), and None for texts that were not embedded.
        """
        batch_tokens = require_integer("batch_tokens", batch_tokens, 1)
        require_flag("truncate", truncate)
        require_flag("progress", progress)
        pooling = self.sentences.pooling if pooling is None else pooling
        require_choice("pooling", pooling, ("mean", "first"))
        normalize = self.sentences.normalize if normalize is None else normalize
        require_flag("normalize", normalize)
        prompt = self.sentences.prompt if prompt is None else prompt
        if prompt is not None and not self.sentences.prompts:
            raise ValueError(f"prompt: expected None for a model without prompts, got {prompt!r}")
        if prompt is not None:
            require_choice("prompt", prompt, tuple(self.sentences.prompts))
        single = isinstance(texts, str)
        before = "" if prompt is None else self.sentences.prompts[prompt]
        lowered = str.lower if self.sentences.lowercase else str  # by sentence-transformers special tokens are, too
        rows = [self.encode(lowered(before + text), name, truncate) for name, text in named(texts)]
        counts = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: -counts[row])
        weight = self.model.first_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        result = torch.empty(len(rows), self.model.config.hidden_size, dtype=dtype, device=weight.device)
        done = 0
        try:
            with evaluating(others(self.model)), tqdm(total=len(rows), unit="text", disable=not progress or None) as bar:
                while done < len(rows):
                    batch = batch_of(order[done:], counts, batch_tokens)
                    lengths = [counts[row] for row in batch]
                    ids = torch.tensor([token for row in batch for token in rows[row]], device=weight.device)
                    result[batch] = pooled(self.model.encode_packed(ids, lengths), lengths, pooling, normalize)
                    done += len(batch)
                    bar.update(len(batch))
        except KeyboardInterrupt:
            embedded = set(order[:done])
            raise Interrupted([result[row] if row in embedded else None for row in range(len(rows))]) from None
        return result[0] if single else result

    @torch.no_grad()
    def fill(self, texts: str | Sequence[str], top_k: int = 5) -> list:
        """The most likely tokens for the masks of texts.

        Args:
            texts: a text with one or several masks, such as "[MASK]" or "<mask>": the tokenizer's mask_token; or a list of any
                number.
            top_k: the number of tokens for each mask.

        Returns: a list of top_k `Filling`s, the most likely one first; of a text with several masks, a list of these, each as if
            the other masks remain; of a list of texts, a list of what each would return.
        Raises: TypeError, ValueError, naming the argument and the text, also for a model without a masked-language head.
        """
        config = self.model.config
        top_k = require_integer("top_k", top_k, 1, config.vocab_size)
        if not config.masked_head:
            raise ValueError("model: expected one with a masked-language head, which this checkpoint does not have")
        mask = self.tokenizer.special_tokens.get("mask_token", "")
        mask_id = self.tokenizer.backend.token_to_id(mask)
        if mask_id is None:
            raise ValueError("model: expected a tokenizer with a mask_token, this one has none")
        results = []
        for name, text in named(texts):
            ids = torch.tensor(self.encode(text, name), device=self.model.first_weight.device)
            masks = (ids == mask_id).nonzero().squeeze(1)
            if len(masks) == 0:
                raise ValueError(f"{name}: expected a text with the token {mask}, got {text!r}")
            with evaluating(others(self.model)):
                states = self.model.encode_packed(ids, [len(ids)])[masks]
                probabilities = self.model.logits(states).to(torch.promote_types(states.dtype, torch.float32)).softmax(-1)
            found = []
            for place, (shares, tokens) in zip(masks.tolist(), zip(*probabilities.topk(top_k))):
                found.append([self._filling(ids, place, *pair) for pair in zip(tokens.tolist(), shares.tolist())])
            results.append(found[0] if len(found) == 1 else found)
        return results[0] if isinstance(texts, str) else results

    def _filling(self, ids: torch.Tensor, place: int, token: int, probability: float) -> Filling:
        filled, backend = ids.tolist(), self.tokenizer.backend
        mask, filled[place] = filled[place], token
        left_out = {id for id, added in backend.get_added_tokens_decoder().items() if added.special} - {mask}
        shown = backend.decode([x for x in filled if x not in left_out], skip_special_tokens=False)
        return Filling(token, backend.decode([token], skip_special_tokens=False).strip(), probability, shown)

    def encode(self, text: str, name: str = "text", truncate: bool = False) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer adds.

        Args:
            name: of the argument that the text comes from, for errors.
            truncate: whether one of more than `max_tokens` tokens loses what is beyond, which is not the special tokens at its
                end.

        Raises: TypeError; ValueError for a text that is too long, or has no tokens, or tokens that the model does not have.
        """
        ids, most = self.tokenizer.encode(text, name=name), self.max_tokens
        if not ids:
            raise ValueError(f"{name}: expected at least one token, got an empty text")
        if len(ids) > most:
            if not truncate:
                raise ValueError(
                    f"{name}: expected at most {most} tokens, got {len(ids)}: truncate=True leaves out those beyond"
                )
            is_special = self.tokenizer.backend.encode(text).special_tokens_mask
            ending = is_special[::-1].index(0)  # tokens
            ids = ids[: max(0, most - ending)] + ids[len(ids) - ending :]
        if max(ids) >= (size := self.model.config.vocab_size):
            token = self.tokenizer.backend.id_to_token(max(ids))
            raise ValueError(f"{name}: expected tokens of the model, which has {size}, got {token!r} with id {max(ids)}")
        return ids


def embed(texts: str | Sequence[str], model: "EncoderPipeline | str | Path", **options: Any) -> torch.Tensor:
    """The embeddings of texts by a sentence model: sorted by length, and packed into batches without padding.

    Args:
        texts: a text, or a list of any number.
        model: what `fastgpt.pipeline` returns for the checkpoint of an encoder; or a path or an id, which is loaded for this
            call.
        options: those of `EncoderPipeline.embed`: batch_tokens, truncate, pooling, normalize, prompt, progress.

    Returns: (B, C) on the device of the model, in fp32 (of fp64 weights, fp64), in the order of texts; of one text, (C,).
    Raises: TypeError, ValueError, naming the argument and the text; FileNotFoundError, ValueError for a checkpoint;
        `fastgpt.Interrupted`, a KeyboardInterrupt, on Ctrl-C.
    """
    pipe = model if isinstance(model, EncoderPipeline) else EncoderPipeline.from_pretrained(model)
    return pipe.embed(texts, **options)


def named(texts: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each text with its name in errors. Raises TypeError."""
    if isinstance(texts, str):
        return [("texts", texts)]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts: expected a str or a list of them, got {texts!r}")
    return [(f"texts[{i}]", text) for i, text in enumerate(texts)]


def batch_of(rows: list[int], lengths: list[int], batch_tokens: int) -> list[int]:
    """The first of the rows, by their lengths, of together at most so many tokens; at least one."""
    total, count = lengths[rows[0]], 1
    while count < len(rows) and total + lengths[rows[count]] <= batch_tokens:
        total, count = total + lengths[rows[count]], count + 1
    return rows[:count]
