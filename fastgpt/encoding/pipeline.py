"""An encoder and its tokenizer: from texts to embeddings, and to words for masked tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastgpt.checkpoints import hub
from fastgpt.checks import listed, make_list, require_choice, require_flag, require_integer, shown
from fastgpt.encoding.sentences import POOLINGS, Sentences, pooled, read_sentences
from fastgpt.generation.many import Interrupted
from fastgpt.model.encoder import Encoder
from fastgpt.model.evaluation_mode import evaluating, others
from fastgpt.ops.quantized_weight import Quantization
from fastgpt.text.tokenizer import Tokenizer, require_text

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
        texts: str | Iterable[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        truncate: bool = False,
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """The embeddings of texts. They are sorted by length, and packed into batches without padding.

        Args:
            texts: a text, or a list or an iterator of any number.
            batch_tokens: tokens of a batch, which has at least one text.
            truncate: texts of more than `max_tokens` tokens lose what is beyond. False: they are an error, before any text is
                embedded.
            pooling: "mean" or "first", as in `Sentences`; "cls" is "first". Default: the model's.
            normalize: whether embeddings are divided by their length. Default: as the model's files say.
            prompt_name: of one of `sentences.prompts`, which goes before each text. Default: the model's, if it has one.
            prompt: a text that goes before each one in its place, such as "query: "; "" for none. As in sentence-transformers.
            progress: whether to show a progress bar on standard error.

        Returns: (B, C) on the device of the model, in fp32 (of fp64 weights, fp64), in the order of texts; of one text, (C,).
        Raises: TypeError, ValueError, naming the argument and the text; `fastgpt.Interrupted`, a KeyboardInterrupt, on Ctrl-C,
            whose `results` has embeddings (C,), and None for texts that were not embedded.
        """
        batch_tokens = require_integer("batch_tokens", batch_tokens, 1)
        require_flag("truncate", truncate)
        require_flag("progress", progress)
        require_choice("pooling", pooling, (*POOLINGS, None))
        pooling = self.sentences.pooling if pooling is None else POOLINGS[pooling]
        normalize = self.sentences.normalize if normalize is None else normalize
        require_flag("normalize", normalize)
        before = self._before(prompt_name, prompt)
        single, several = isinstance(texts, str), listed(texts)
        lowered = str.lower if self.sentences.lowercase else str  # by sentence-transformers special tokens are, too
        rows = [self.encode(lowered(before + text), name, truncate) for name, text in named(several)]
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

    def _before(self, prompt_name: str | None, prompt: str | None) -> str:
        """What goes before each text."""
        prompts = self.sentences.prompts
        if prompt is not None:
            require_text(prompt, "prompt")
            if prompt_name is not None:
                raise ValueError(f"prompt: expected none with prompt_name={prompt_name!r}, got {shown(prompt)}")
            if prompt and prompt in prompts:
                raise ValueError(
                    f"prompt: expected a text to go before each one, got {shown(prompt)}, the name of one: prompt_name={prompt!r} "
                    "takes it"
                )
            return prompt
        if prompt_name is None:
            prompt_name = self.sentences.default_prompt_name
        elif not prompts:
            raise ValueError(f"prompt_name: expected None for a model without prompts, got {shown(prompt_name)}")
        else:
            require_choice("prompt_name", prompt_name, tuple(prompts))
        return "" if prompt_name is None else prompts[prompt_name]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Raises TypeError: an encoder has `embed` and `fill` in place of continuing texts."""
        kind = self.model.checkpoint_config.get("model_type", "an Encoder")
        fills = ", and pipe.fill(text) words for masked tokens" if self.model.config.masked_head else ""
        raise TypeError(
            f"pipe: expected a decoder, which continues texts, got an encoder, {kind!r}: pipe.embed(texts) returns embeddings{fills}"
        )

    chat = stream = start = conversation = __call__

    @torch.no_grad()
    def fill(self, texts: str | Iterable[str], top_k: int = 5, *, truncate: bool = False) -> list:
        """The most likely tokens for the masks of texts.

        Args:
            texts: a text with one or several masks, such as "[MASK]" or "<mask>": the tokenizer's mask_token; or a list or an
                iterator of any number.
            top_k: the number of tokens for each mask.
            truncate: texts of more than `max_tokens` tokens lose what is beyond, in which there must be no mask. False: they are
                an error.

        Returns: a list of top_k `Filling`s, the most likely one first; of a text with several masks, a list of these, each as if
            the other masks remain; of a list of texts, a list of what each would return.
        Raises: TypeError, ValueError, naming the argument and the text, also for a model without a masked-language head.
        """
        config = self.model.config
        top_k = require_integer("top_k", top_k, 1, config.vocab_size)
        require_flag("truncate", truncate)
        if not config.masked_head:
            raise ValueError("model: expected one with a masked-language head, which this checkpoint does not have")
        mask = self.tokenizer.special_tokens.get("mask_token", "")
        mask_id = self.tokenizer.backend.token_to_id(mask)
        if mask_id is None:
            raise ValueError("model: expected a tokenizer with a mask_token, this one has none")
        single, results = isinstance(texts, str), []
        for name, text in named(listed(texts)):
            tokens = self.encode(text, name, truncate)
            if truncate and tokens.count(mask_id) < self.tokenizer.encode(text, name=name).count(mask_id):
                most = self.max_tokens
                raise ValueError(
                    f"{name}: expected masks among the first {most} tokens, got one beyond, which truncate leaves out"
                )
            ids = torch.tensor(tokens, device=self.model.first_weight.device)
            masks = (ids == mask_id).nonzero().squeeze(1)
            if len(masks) == 0:
                raise ValueError(f"{name}: expected a text with the token {mask}, got {shown(text)}")
            with evaluating(others(self.model)):
                states = self.model.encode_packed(ids, [len(ids)])[masks]
                probabilities = self.model.logits(states).to(torch.promote_types(states.dtype, torch.float32)).softmax(-1)
            found = []
            for place, (shares, best) in zip(masks.tolist(), zip(*probabilities.topk(top_k))):
                found.append([self._filling(ids, place, *pair) for pair in zip(best.tolist(), shares.tolist())])
            results.append(found[0] if len(found) == 1 else found)
        return results[0] if single else results

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
            raise ValueError(f"{name}: expected tokens of the model, which has {size}, got {shown(token)} with id {max(ids)}")
        return ids


def embed(texts: str | Iterable[str], model: "EncoderPipeline | str | Path", **options: Any) -> torch.Tensor:
    """The embeddings of texts by a sentence model: sorted by length, and packed into batches without padding.

    Args:
        texts: a text, or a list or an iterator of any number.
        model: what `fastgpt.pipeline` returns for the checkpoint of an encoder; or a path or an id, which is loaded for this
            call.
        options: those of `EncoderPipeline.embed`: batch_tokens, truncate, pooling, normalize, prompt_name, prompt, progress.

    Returns: (B, C) on the device of the model, in fp32 (of fp64 weights, fp64), in the order of texts; of one text, (C,).
    Raises: TypeError, ValueError, naming the argument and the text; FileNotFoundError, ValueError for a checkpoint;
        `fastgpt.Interrupted`, a KeyboardInterrupt, on Ctrl-C.
    """
    if not isinstance(model, (EncoderPipeline, str, Path)):
        raise TypeError(
            f"model: expected what fastgpt.pipeline returns for an encoder, a path or an id, got {type(model).__name__}"
        )
    pipe = model if isinstance(model, EncoderPipeline) else EncoderPipeline.from_pretrained(model)
    return pipe.embed(texts, **options)


def named(texts: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each text with its name in errors. Raises TypeError."""
    if isinstance(texts, str):
        return [("texts", texts)]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts: expected a str or a list of them, got {shown(texts)}{make_list('texts', texts)}")
    return [(f"texts[{i}]", text) for i, text in enumerate(texts)]


def batch_of(rows: list[int], lengths: list[int], batch_tokens: int) -> list[int]:
    """The first of the rows, by their lengths, of together at most so many tokens; at least one."""
    total, count = lengths[rows[0]], 1
    while count < len(rows) and total + lengths[rows[count]] <= batch_tokens:
        total, count = total + lengths[rows[count]], count + 1
    return rows[:count]
