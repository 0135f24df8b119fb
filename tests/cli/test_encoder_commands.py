"""`fastgpt embed` and `fastgpt fill`."""

import json
import re

import numpy as np
import pytest
import torch
from command_line import run
from encoder_checkpoints import TEXTS, sentence_model
from safetensors.torch import load_file, save_file

import fastgpt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    folder = sentence_model(tmp_path_factory.mktemp("model"), prompts=prompts)
    weights = load_file(folder / "model.safetensors")  # as earlier versions of transformers stored them
    save_file(weights | {"bert.embeddings.position_ids": torch.arange(40)[None]}, folder / "model.safetensors")
    return folder


def test_embed(model, tmp_path, capsys):
    texts = [text for text in TEXTS if text]
    expected = fastgpt.embed(texts, model)
    status, out, error = run(capsys, "embed", *texts, "--model", model, "--device", "cpu")
    assert (status, error) == (0, "")
    assert torch.equal(torch.tensor([json.loads(line) for line in out.splitlines()]), expected)
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    arguments = "--texts", tmp_path / "texts.txt", "--out", tmp_path / "out.npy", "--batch-tokens", 9, "--dtype", "float32"
    status, out, _ = run(capsys, "embed", *arguments, "--model", model)
    assert (status, out) == (0, "")
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected)


def test_embed_with_options(model, capsys):
    pipe = fastgpt.pipeline(model)
    for options, arguments in (
        (("--prompt-name", "query", "--pooling", "cls"), {"prompt_name": "query", "pooling": "first"}),
        (("--prompt", "query: ", "--pooling", "mean"), {"prompt": "query: "}),
    ):
        status, out, error = run(capsys, "embed", "the dog", "a cat", "--model", model, "--json", *options)
        rows = [json.loads(line) for line in out.splitlines()]
        assert (status, error) == (0, "") and [row["text"] for row in rows] == ["the dog", "a cat"]
        assert torch.equal(torch.tensor([row["embedding"] for row in rows]), pipe.embed(["the dog", "a cat"], **arguments))
    status, out, _ = run(capsys, "embed", "the dog", "--model", model, "--weights", "int8")
    smaller = fastgpt.pipeline(model, weights="int8").embed(["the dog"])
    assert (
        status == 0
        and torch.equal(torch.tensor([json.loads(out)]), smaller)
        and not torch.equal(smaller, pipe.embed(["the dog"]))
    )


def test_fill_of_several_masks(model, capsys):
    arguments = "fill", "[MASK] the [MASK].", "--model", model, "--top-k", 2, "--dtype", "bfloat16", "--weights", "int8"
    status, out, error = run(capsys, *arguments)
    assert (status, error) == (0, "")
    parts = re.fullmatch(r"--- mask 1 of 2\n( +[0-9.]+%  .*\n){2}\n--- mask 2 of 2\n( +[0-9.]+%  .*\n){2}", out)
    assert parts, out
    long = "[MASK] " + "the " * 50
    assert run(capsys, "fill", long, "--model", model, "--truncate")[0] == 0


def test_info(model, tmp_path, capsys):
    status, out, error = run(capsys, "info", model)
    assert (status, error) == (0, "") and "position_ids" not in out and "not served" not in out and "I64" not in out
    lines = dict(re.findall(r"^([\w ]+): +(.*)$", out, re.MULTILINE))
    assert lines["loaded by"] == "fastgpt.pipeline, fastgpt.Encoder.from_pretrained"
    assert lines["embed"] == "the mean of all tokens, normalized; prompts query, document"
    assert lines["fill"] == "words for masked tokens"
    facts = json.loads(run(capsys, "info", model, "--json")[1])
    assert facts["loaded_by"] == ["fastgpt.pipeline", "fastgpt.Encoder.from_pretrained"] and facts["fill"] is True
    assert facts["embed"]["pooling"] == "mean" and list(facts["embed"]["prompts"]) == ["query", "document"]
    labels = {0: "good", 1: "bad", 2: "so so"}
    fastgpt.SequenceClassifier(fastgpt.Encoder.from_pretrained(model), 3, id2label=labels).save_pretrained(tmp_path)
    lines = dict(re.findall(r"^([\w ]+): +(.*)$", run(capsys, "info", tmp_path)[1], re.MULTILINE))
    assert lines["architecture"] == "bert" and lines["loaded by"] == "fastgpt.SequenceClassifier.from_pretrained"
    assert lines["labels"] == "3: good, bad, so so" and "embed" not in lines
    assert json.loads(run(capsys, "info", tmp_path, "--json")[1])["labels"] == ["good", "bad", "so so"]
    status, _, error = run(capsys, "embed", "the dog", "--model", tmp_path)
    assert status == 2 and "got BertForSequenceClassification, which fastgpt.SequenceClassifier.from_pretrained loads" in error


def test_fill(model, capsys):
    expected = fastgpt.pipeline(model).fill("the [MASK].", 3)
    status, out, _ = run(capsys, "fill", "the [MASK].", "--model", model, "--top-k", 3)
    assert status == 0 and [line.split("%  ")[1] for line in out.splitlines()] == [filling.filled for filling in expected]
    status, out, _ = run(capsys, "fill", "the [MASK].", "--model", model, "--top-k", 3, "--json")
    assert [entry["token"] for entry in json.loads(out)] == [filling.token for filling in expected]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["embed", "the", "the " * 50],
            "error: text 2: expected at most 40 tokens, got 52: --truncate leaves out those beyond",
        ),
        (["fill", "the dog"], "error: text 1: expected a text with the token"),
        (["fill", "[MASK] " * 50, "--truncate"], "error: text 1: expected masks among the first 40 tokens"),
        (["embed", "the", "--prompt-name", "q"], "error: --prompt-name: expected one of 'query', 'document', got 'q'"),
        (
            ["embed", "the", "--prompt", "query"],
            "error: --prompt: .* got 'query', the name of one: --prompt-name query takes it",
        ),
        (
            ["embed", "the", "--prompt", "a", "--prompt-name", "b"],
            "error: --prompt: expected none with --prompt-name b, got 'a'",
        ),
        (["embed", "the", "--json", "--out", "x.npy"], "error: --json: expected none with --out"),
        (["generate", "the dog"], "model_type: expected a decoder, got 'bert', which fastgpt.Encoder loads"),
        (["inspect", "the dog"], "model_type: expected a decoder, got 'bert'"),
    ],
)
def test_errors(arguments, message, model, capsys):
    status, out, error = run(capsys, *arguments, "--model", model)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ")
    assert re.search(message, error), error
