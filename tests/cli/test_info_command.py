"""`fastgpt info`."""

import json
import re
import shutil

import torch
from command_line import run
from texts import byte_level, write_checkpoint

import fastgpt
from fastgpt import GPT
from fastgpt.cli import info
from fastgpt.ops import explain


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"fastgpt {fastgpt.__version__}" in out and f"torch {torch.__version__}" in out
    assert "attention on cpu: cpp" in out and "not triton: it runs on CUDA tensors" in out
    assert "attention_with_kv_cache on cpu: unfused" in out
    assert "on cpu: reference" not in out  # there is a kernel for each


def test_info_as_json(capsys):
    """What the text says."""
    status, out, error = run(capsys, "info", "--json")
    facts, text = json.loads(out), run(capsys, "info")[1]
    assert (status, error, out.count("\n")) == (0, "", 1)
    assert (facts["fastgpt"], facts["torch"]) == (fastgpt.__version__, torch.__version__)
    assert facts["build"] == fastgpt.build_info() and len(facts["gpus"]) == torch.cuda.device_count()
    shown = re.findall(r"^(\S+) on (\S+): (\w+)$", text, re.MULTILINE)
    assert [(entry["operation"], entry["device"], entry["implementation"]) for entry in facts["operations"]] == shown
    assert all(entry["explanation"][entry["implementation"]] == "chosen" for entry in facts["operations"])
    assert text.endswith("\n" + "".join(f"{name}: {meaning}\n" for name, meaning in facts["implementations"].items()))


def test_info_tells_of_all_that_can_be_explained(capsys):
    """And what each name of an implementation means."""
    assert info.OPERATIONS.keys() == explain.OPERATIONS.keys()
    _, out, _ = run(capsys, "info")
    for operation, meaning in info.OPERATIONS.items():
        assert re.search(rf"^{operation.__qualname__} on cpu: \w+\n    {meaning}\n    not \w+: ", out, re.MULTILINE)
    calls, _, meanings = out.partition("\n\n")[2].rpartition("\n\n")
    named = re.findall(r"^(?:\S+ on cpu: |    not )(\w+)", calls, re.MULTILINE)
    assert set(named) == {line.partition(": ")[0] for line in meanings.splitlines()}


def lines_of(out):
    return dict(re.findall(r"^([\w ]+): +(.*)$", out, re.MULTILINE))


def test_info_of_a_folder(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model", byte_level(), tokenizer_config={"chat_template": "{{ 1 }}"})
    model = GPT.from_pretrained(folder)
    status, out, error = run(capsys, "info", folder)
    assert (status, error) == (0, "")
    size = (folder / "model.safetensors").stat().st_size
    assert lines_of(out) == {
        "architecture": model.checkpoint_config["model_type"], "name": "model",
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}", "size": f"{size / 1e6:.1f} MB",
        "context": str(model.config.context_length), "vocabulary": f"{model.config.vocab_size:,} tokens",
        "tokenizer": "tokenizer.json", "chat template": "yes", "quantization": "none",
    }  # fmt: skip
    assert re.search(rf"^F32 +{len(list(model.parameters()))} +[\d.]+ MB$", out, re.MULTILINE)

    assert run(capsys, "quantize", folder, tmp_path / "smaller", "--weights", "int8")[0] == 0
    smaller = lines_of(run(capsys, "info", tmp_path / "smaller")[1])
    assert smaller["parameters"] == lines_of(out)["parameters"] and smaller["quantization"] == "fastgpt"

    facts = json.loads(run(capsys, "info", folder, "--json")[1])
    types = facts.pop("types")
    assert facts == {
        "architecture": model.checkpoint_config["model_type"], "served": True, "name": "model",
        "parameters": sum(weight.numel() for weight in model.parameters()), "files": 1, "bytes": size,
        "context_length": model.config.context_length, "vocab_size": model.config.vocab_size,
        "tokenizer": ["tokenizer.json"], "chat_template": True, "quantization": None,
    }  # fmt: skip
    stored = {"tensors": len(list(model.parameters())), "bytes": sum(weight.nbytes for weight in model.parameters())}
    assert types == {"F32": stored | {"served": True}}


def test_info_of_folders_that_are_not_served(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(fastgpt.SHIPPED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    status, out, _ = run(capsys, "info", folder)
    assert status == 0 and re.search("^architecture: +mamba, which is not served: .*model_type: expected one of", out)
    assert re.search(r"^F32 +76 +11.1 MB$", out, re.MULTILINE) and lines_of(out)["vocabulary"] == "65 tokens"
    facts = json.loads(run(capsys, "info", folder, "--json")[1])
    assert not facts["served"] and "model_type: expected one of" in facts["reason"] and facts["vocab_size"] == 65
    (folder / "model.safetensors").unlink()
    status, out, error = run(capsys, "info", folder)
    assert status == 2 and not out and error.startswith("fastgpt: error: model: expected model.safetensors")
