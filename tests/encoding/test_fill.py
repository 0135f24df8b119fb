"""Words for masked tokens, as transformers' pipeline gives them."""

import pytest
import torch
from encoder_checkpoints import VOCABULARY, sentence_model

import fastgpt
from fastgpt.encoding.pipeline import Filling

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def test_tokens_are_those_of_transformers(tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path))
    theirs = transformers.pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path))
    for text in ("the [MASK] sat on the mat.", "[MASK]", "the [MASK] sat on the [MASK]."):
        found, expected = pipe.fill(text, top_k=7), theirs(text, top_k=7)
        several = [found, expected] if text.count("[MASK]") == 1 else None
        for fillings, wanted in [several] if several else zip(found, expected, strict=True):
            assert [filling.token for filling in fillings] == [entry["token"] for entry in wanted]
            assert [filling.text for filling in fillings] == [entry["token_str"].strip() for entry in wanted]
            shares = torch.tensor([filling.probability for filling in fillings])
            torch.testing.assert_close(shares, torch.tensor([entry["score"] for entry in wanted]))
            if not several:
                assert all(filling.filled.count("[MASK]") == 1 + (filling.text == "[MASK]") for filling in fillings)
            else:
                assert [filling.filled for filling in fillings] == [entry["sequence"] for entry in wanted]


def test_lists_and_all_tokens(tmp_path):
    pipe = fastgpt.pipeline(sentence_model(tmp_path))
    one, (several, again) = pipe.fill("the [MASK]."), pipe.fill(["the [MASK].", "[MASK] [MASK]"])
    assert several == one and len(again) == 2 and len(one) == len(again[0]) == 5 and isinstance(one[0], Filling)
    every = pipe.fill("the [MASK].", top_k=len(VOCABULARY))
    assert sum(filling.probability for filling in every) == pytest.approx(1)
    assert pipe.fill([]) == [] and pipe.fill(text for text in ["the [MASK]."]) == [one]
    long = "the [MASK]. " + "the " * 60
    cut = pipe.tokenizer.decode(pipe.encode(long, truncate=True)[1:-1])
    assert [filling.token for filling in pipe.fill(long, truncate=True)] == [
        filling.token for filling in pipe.fill("the [MASK]. " + "the " * 35)
    ], cut


BAD = [
    ("the dog", {}, ValueError, r"texts: expected a text with the token \[MASK\], got 'the dog'"),
    (["[MASK]", "the dog"], {}, ValueError, r"texts\[1\]: expected a text with the token \[MASK\]"),
    ("[MASK]", {"top_k": 0}, ValueError, "top_k: expected an integer >= 1"),
    ("[MASK]", {"top_k": 1000}, ValueError, f"top_k: expected an integer >= 1 and <= {len(VOCABULARY)}"),
    (3, {}, TypeError, "texts: expected a str or a list of them, got 3"),
    ("[MASK] " * 50, {}, ValueError, "texts: expected at most 40 tokens, got 52"),
    ("[MASK] " * 50, {"truncate": True}, ValueError, "texts: expected masks among the first 40 tokens, got one beyond"),
    ("[MASK]", {"truncate": 1}, TypeError, "truncate: expected"),
]


@pytest.mark.parametrize("texts, options, error, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_errors(texts, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fastgpt.pipeline(sentence_model(tmp_path)).fill(texts, **options)


def test_models_that_cannot(tmp_path):
    with pytest.raises(ValueError, match="model: expected one with a masked-language head"):
        fastgpt.pipeline(sentence_model(tmp_path / "a", masked_head=False)).fill("[MASK]")
    folder = sentence_model(tmp_path / "b")
    text = (folder / "vocab.txt").read_text()
    (folder / "vocab.txt").write_text(text.replace("[MASK]", "[OTHER]"))
    with pytest.raises(ValueError, match="model: expected a tokenizer with a mask_token, this one has none"):
        fastgpt.pipeline(folder).fill("[MASK]")
