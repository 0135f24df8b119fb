"""Texts from texts by an encoder-decoder: pipeline, `fastgpt generate`, `fastgpt info`, and commands that take none."""

import json

import pytest
import tokenizers
import torch
from command_line import run

import fastgpt
from fastgpt import Encoder, EncoderDecoder
from fastgpt.testing import numerics

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PIECES = ["▁the", "▁dog", "▁cat", "s", "▁sat", "▁on", "▁a", "▁mat", ".", "▁", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 that transformers wrote, with a tokenizer of T5's kind: unigrams, an end token after each text."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -len(PIECES) + 1.5 * len(piece)) for piece in PIECES),
    ]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if ".block." in name and parameter.dim() > 1 else 0.1)
        model.shared.weight.mul_(0.3)
    model.save_pretrained(folder)
    return folder


TEXTS = ["the dog sat on the mat.", "a cat", "dogs on a mat"]


def their_texts(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False, num_beams=1
    )
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def test_texts_are_those_of_transformers(folder):
    pipe, expected = fastgpt.pipeline(folder, device="cpu"), their_texts(folder)
    assert isinstance(pipe.model, EncoderDecoder) and pipe.encode(TEXTS[0])[-1] == 1
    assert len(set(expected)) == 3 and all(expected)
    assert pipe(TEXTS, max_new_tokens=20) == expected
    assert "".join(pipe.stream(TEXTS[0], max_new_tokens=20)) == expected[0]
    rows = pipe.start(TEXTS, max_new_tokens=20, return_logprobs=True).finish()
    assert [row.text for row in rows] == expected and all(len(row.logprobs) == len(row.tokens) for row in rows)
    stop = expected[0][3:5]
    assert pipe(TEXTS[0], max_new_tokens=20, stop=stop) == expected[0][: expected[0].index(stop)]
    samples = pipe(TEXTS[0], max_new_tokens=20, temperature=1.0, seed=3, num_samples=2)
    assert len(samples) == 2 and samples == pipe(TEXTS[0], max_new_tokens=20, temperature=1.0, seed=3, num_samples=2)


def test_generate(folder, capsys):
    """It prints what the model writes, without the prompt."""
    expected, options = their_texts(folder), ["--model", folder, "--device", "cpu", "--max-new-tokens", 20]
    assert run(capsys, "generate", TEXTS[0], *options)[:2] == (0, expected[0] + "\n")
    status, out, _ = run(capsys, "generate", *TEXTS, *options, "--json")
    assert status == 0 and [sample["text"] for sample in json.loads(out)["samples"]] == expected
    status, out, _ = run(capsys, "generate", TEXTS[0], *options, "--compare-cache")
    assert status == 0 and "tokens: the same" in out
    assert run(capsys, "generate", TEXTS[0], *options, "--speculate")[1] == expected[0] + "\n"
    status, _, error = run(capsys, "generate", TEXTS[0], *options, "--max-batch", 2)
    assert status != 0 and "model: expected one without cross-attention" in error
    status, _, error = run(capsys, "generate", TEXTS[0], *options, "--cache", "sliding", "--window", 8)
    assert status != 0 and "expected a contiguous or a paged one for a model with relative positions" in error
    status, _, error = run(capsys, "generate", TEXTS[0], *options, "--lora", folder)
    assert status != 0 and "lora: expected none for an encoder-decoder" in error


def test_info(folder, tmp_path, capsys):
    status, out, _ = run(capsys, "info", folder)
    assert status == 0 and "loaded by:     fastgpt.pipeline, fastgpt.EncoderDecoder.from_pretrained\n" in out
    assert "architecture:  t5\n" in out and "context:       32,768\n" in out
    Encoder.from_pretrained(folder).save_pretrained(tmp_path)
    assert "loaded by:     fastgpt.pipeline, fastgpt.Encoder.from_pretrained\n" in run(capsys, "info", tmp_path)[1]


@pytest.mark.parametrize("command", [("chat",), ("inspect", "the dog"), ("quantize",)], ids=lambda command: command[0])
def test_commands_of_decoders(command, folder, tmp_path, capsys):
    arguments = (
        [folder, tmp_path / "out", "--weights", "int8"] if command[0] == "quantize" else [*command[1:], "--model", folder]
    )
    status, _, error = run(capsys, command[0], *arguments)
    assert status != 0 and "model: expected a decoder, got an encoder-decoder in" in error


def test_embedding_takes_the_encoder(folder, tmp_path):
    """Of a folder of the encoder alone."""
    Encoder.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    pipe = fastgpt.pipeline(tmp_path, device="cpu")
    ids = torch.tensor([pipe.encode(TEXTS[0])])
    oracle = transformers.T5EncoderModel.from_pretrained(folder)
    with torch.no_grad(), numerics.only_double_precision():
        numerics.check(pipe.embed(TEXTS)[0], lambda: oracle.double()(ids).last_hidden_state[0].mean(0))
