"""LoRA: adapters of decoders with plain and quantized weights, trained, resumed, and in PEFT's format."""

import copy
import json
import re
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from command_line import run
from family_checkpoints import COMMON, CONFIGS, ids_of
from models import random_model
from safetensors.torch import save_file
from training_runs import TEXT, TINY

from fastgpt import GPT, QuantizedWeight, generate, pipeline
from fastgpt.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastgpt.model.lora import LoRALinear, add_adapters
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer, pretrained

SMALL = dict(steps=12, eval_interval=6, eval_windows=8, batch_size=4, context=16, learning_rate=2e-2, warmup=0)
FAMILIES = {
    "gpt2": CONFIGS["gpt2"],
    "llama": ("Llama", COMMON | dict(intermediate_size=128)),
    "phi3": ("Phi3", COMMON | dict(intermediate_size=128, sliding_window=None)),
    "gpt_neox": (
        "GPTNeoX",
        CONFIGS["gpt_neox"][1] | dict(intermediate_size=128),
    ),  # whose rows of queries, keys and values are in another order, as are those of GLM-4
    "glm4": ("Glm4", COMMON | dict(intermediate_size=128, head_dim=24)),
    "deepseek_v3": (
        "DeepseekV3",
        CONFIGS["deepseek_v3"][1] | dict(intermediate_size=128, kv_lora_rank=32, q_lora_rank=32, v_head_dim=16),
    ),
    "mixtral": CONFIGS["mixtral"],
}
TARGETS = dict.fromkeys(("deepseek_v3", "mixtral"), {"lora_targets": "qkv,out"})  # mixtures of experts


def checkpoint_of(family, folder):
    """Of transformers, and its model."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).eval()
    model.save_pretrained(folder)
    Tokenizer.from_corpus(TEXT).save(folder / "tokenizer.json")
    return model


def started(base, **settings):
    config, model, tokenizer = pretrained(base, **SMALL | {"lora": 4} | settings)
    return Trainer(TEXT, config, model=model, tokenizer=tokenizer, base=base)


def stored(model):
    """All numbers of a model by name, quantized ones as they are stored."""
    return {
        name: (weight.blocks if isinstance(weight, QuantizedWeight) else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def logits(model):
    with torch.no_grad():
        return model(ids_of(2, 12))


def loaded_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def check_logits(found, model):
    """Against those of a model, ours, of transformers or of PEFT, by the numerics contract."""
    with torch.no_grad(), numerics.only_double_precision():
        double = copy.deepcopy(model).double()
        if not isinstance(model, GPT):
            double.config._experts_implementation = "eager"  # of which there is float64
        numerics.check(found, lambda: double(ids_of(2, 12)) if isinstance(model, GPT) else double(ids_of(2, 12)).logits)


@pytest.mark.parametrize("weights", ("stored", "int8", "int4"))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_only_adapters_are_trained(family, weights, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    checkpoint_of(family, base)
    trainer = started(base, weights=weights)
    before, first = stored(trainer.model), trainer.evaluate()
    plain = GPT.from_pretrained(base, weights=None if weights == "stored" else weights)
    plain.save_pretrained(tmp_path / "plain", weights="dequantized")
    check_logits(logits(trainer.model.eval()), loaded_by_transformers(tmp_path / "plain"))  # adapters start from zero
    train(trainer, out)
    assert trainer.best_loss < first - 0.2  # nats: embeddings and the output matrix are as drawn
    for name, weight in stored(trainer.model).items():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name
    assert sum("lora_A" in name for name in before) == 4 * 3
    names = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.json", "training_state.pt"}
    assert names <= {path.name for path in out.iterdir()} and not (out / "model.safetensors").exists()
    assert (out / ADAPTER_WEIGHTS).stat().st_size < 200_000

    # What was saved is the model with the lowest held-out loss: beside quantized weights, and in others.
    loaded = GPT.from_pretrained(base, weights=None if weights == "stored" else weights, lora=out)
    assert any(isinstance(layer, LoRALinear) for layer in loaded.modules()) == (weights != "stored")
    trainer.model = loaded
    assert trainer.evaluate() == pytest.approx(trainer.best_loss, rel=1e-4)
    assert generate(loaded, ids_of(1, 5), 8).shape == (1, 13)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_them(family, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = checkpoint_of(family, tmp_path / "base")
    train(started(tmp_path / "base", **TARGETS.get(family, {})), tmp_path / "out")
    ours = logits(GPT.from_pretrained(tmp_path / "base", lora=tmp_path / "out"))
    with pytest.raises(AssertionError):
        check_logits(ours, theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    check_logits(ours, adapted)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weights", (None, "int8"))
@pytest.mark.parametrize(
    "family, targets, options",
    [
        ("llama", "all-linear", {}),  # whose queries, keys and values have an A each
        ("llama", ["q_proj", "v_proj", "up_proj"], {"use_rslora": True}),
        ("llama", ["o_proj", "k_proj", "lm_head"], {"rank_pattern": {"k_proj": 2}}),
        ("gpt2", ["c_attn", "mlp.c_proj"], {}),
        ("phi3", "all-linear", {}),
        ("gpt_neox", ["query_key_value"], {}),
        ("glm4", "all-linear", {}),
        ("deepseek_v3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], {}),
    ],
)
def test_adapters_of_peft_are_loaded(family, targets, options, weights, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = checkpoint_of(family, tmp_path / "base")
    plain = logits(GPT.from_pretrained(tmp_path / "base", weights=weights))
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    model = GPT.from_pretrained(tmp_path / "base", weights=weights, lora=tmp_path / "lora")
    if weights is not None:  # the same on the numbers that the weights stand for
        GPT.from_pretrained(tmp_path / "base", weights=weights).save_pretrained(tmp_path / "quantized")
        adapted = GPT.from_pretrained(tmp_path / "quantized", weights="dequantized", lora=tmp_path / "lora")
    check_logits(logits(model), adapted)
    assert (logits(model) - plain).norm() > 0.1 * plain.norm()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_a_tied_output_matrix(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = checkpoint_of("gpt2", tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(
        ValueError, match="^lora: .*got one of lm_head.weight: the output matrix of this model is its token emb"
    ):
        GPT.from_pretrained(tmp_path / "base", lora=tmp_path / "lora")


def test_merged_and_saved(tmp_path):
    """`save_pretrained` of a model with adapters beside its weights writes what they stand for."""
    checkpoint_of("llama", tmp_path / "base")
    trainer = started(tmp_path / "base", weights="int8")
    train(trainer, tmp_path / "out")
    model = GPT.from_pretrained(tmp_path / "base", weights="int8", lora=tmp_path / "out")
    model.save_pretrained(tmp_path / "merged", weights="dequantized")
    theirs = loaded_by_transformers(tmp_path / "merged")
    check_logits(logits(model), theirs)
    model.save_pretrained(tmp_path / "partly")  # what has no adapter stays quantized
    check_logits(logits(GPT.from_pretrained(tmp_path / "partly")), theirs)


@pytest.mark.parametrize("weights", ("stored", "int4"))
def test_a_resumed_run_matches_an_uninterrupted_one(weights, tmp_path, monkeypatch):
    checkpoint_of("llama", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    straight = started("base", weights=weights)
    straight.model.train()
    losses = [straight.train_step() for _ in range(8)]
    first = started("base", weights=weights)
    first.model.train()
    resumed = [first.train_step() for _ in range(3)]
    first.save(tmp_path / "out", weights=True)
    monkeypatch.chdir("/")
    second = Trainer.resume(tmp_path / "out", TEXT)
    second.model.train()
    resumed += [second.train_step() for _ in range(5)]
    assert losses == resumed
    for name, weight in stored(straight.model).items():
        assert torch.equal(weight, stored(second.model)[name]), name
    state = torch.load(tmp_path / "out" / "training_state.pt", weights_only=True)
    assert state["model"] and all("lora_" in name for name in state["model"])
    with pytest.raises(ValueError, match="lora: expected 4, with which the run in .* was started, got 8"):
        Trainer.resume(tmp_path / "out", TEXT, lora=8)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="init_from: expected a checkpoint folder, .*base does not exist"):
        Trainer.resume(tmp_path / "out", TEXT)


@pytest.mark.parametrize("weights", ("stored", "dequantized"))
def test_adapters_of_a_gguf_file(weights, tmp_path, monkeypatch):
    """Whose quantized matrices stay as they are; without LoRA they are dequantized, and trained."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from gguf_files import write

    def blocks(name, matrix):
        return gguf.quantize(matrix, kind), kind

    tokenizer, kind = Tokenizer.from_corpus(TEXT), gguf.GGMLQuantizationType.Q8_0
    monkeypatch.setitem(
        sys.modules, "fastgpt.text.gguf_tokenizer", SimpleNamespace(tokenizer_from_gguf=lambda metadata: tokenizer)
    )
    path = write(checkpoint_of("llama", tmp_path / "base"), tmp_path / "model.gguf", blocks)
    trainer = started(path, lora=4 if weights == "stored" else 0)
    frozen = [weight for weight in trainer.model.parameters() if isinstance(weight, QuantizedWeight)]
    assert bool(frozen) == (weights == "stored")
    first = trainer.evaluate()
    train(trainer, tmp_path / "out")
    assert trainer.best_loss < first - 0.2
    lora = tmp_path / "out" if weights == "stored" else None
    pipe = pipeline(path if lora else tmp_path / "out", lora=lora)
    trainer.model = pipe.model.float()
    assert trainer.evaluate() == pytest.approx(trainer.best_loss, rel=1e-4)
    assert Trainer.resume(tmp_path / "out", TEXT).step == SMALL["steps"]


def test_commands(tmp_path, capsys):
    base, out, text_file = (tmp_path / name for name in ("base", "out", "text.txt"))
    text_file.write_text(TEXT)
    checkpoint_of("llama", base)
    settings = "--lora 2 --weights int8 --lora-targets qkv,up --context 16 --batch-size 4 --steps 4 --eval-windows 4".split()
    status, shown, error = run(capsys, "train", "--init-from", base, "--text", text_file, "--out", out, *settings)
    assert status == 0, error
    assert shown.startswith("3,072 parameters of adapters, beside 123,456 that stay as they are; ")
    status, text, error = run(
        capsys, "generate", "the", "--model", base, "--weights", "int8", "--lora", out, "--max-new-tokens", 5
    )
    assert status == 0 and text.startswith("the"), error
    assert run(capsys, "train", "--resume", "--text", text_file, "--out", out, "--steps", 6)[0] == 0
    config = json.loads((out / ADAPTER_CONFIG).read_text())
    assert config["r"] == 2 and config["target_modules"] == sorted(
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    )
    status, _, error = run(capsys, "generate", "the", "--model", out)
    assert status == 2 and "found adapter_config.json: an adapter is loaded as lora" in error


def test_a_mixture_of_experts_names_the_layers_that_it_takes(tmp_path, capsys):
    base, text_file = tmp_path / "base", tmp_path / "text.txt"
    text_file.write_text(TEXT)
    checkpoint_of("mixtral", base)
    arguments = (
        "train",
        "--init-from",
        base,
        "--text",
        text_file,
        "--lora",
        2,
        "--context",
        16,
        "--steps",
        1,
        "--eval-windows",
        4,
    )
    status, _, error = run(capsys, *arguments, "--out", tmp_path / "a")
    assert status == 2 and re.search(
        "--lora-targets: expected qkv,out for a model with experts, .* got qkv,out,up,down: --lora-targets qkv,out adapts",
        error,
    ), error
    status, shown, error = run(capsys, *arguments, "--out", tmp_path / "b", "--lora-targets", "qkv,out")
    assert status == 0 and " parameters of adapters" in shown, error


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora": -1}, "lora: expected an integer >= 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha: expected a finite number > 0, got 0"),
        ({"lora_targets": "qkv,head"}, "lora_targets: expected some of qkv,out,up,down, got 'qkv,head'"),
        ({"weights": "int2"}, "weights: expected one of 'stored', 'int8', 'int4', got 'int2'"),
        ({"weights": "int8"}, "weights: expected lora with int8, since"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **settings)


@pytest.mark.parametrize("rank", (33, 10**9))
def test_a_rank_that_no_layer_has(rank, tmp_path):
    checkpoint_of("llama", tmp_path)
    _, model, _ = pretrained(tmp_path, **SMALL, lora=rank)
    least = min(min(layer.weight.shape) for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear))
    rank = max(rank, least + 1)
    with pytest.raises(
        ValueError, match=rf"^lora: expected a rank of at most {least}, as blocks\.\d.* is \(.*{least}.*\), got {rank}$"
    ):
        add_adapters(model, rank, 16)
    assert all(weight.requires_grad for weight in model.parameters()) and not any(
        "lora_" in name for name, _ in model.named_parameters()
    )
    add_adapters(model, least, 16)


def test_a_model_without_layers_to_adapt():
    with pytest.raises(
        ValueError, match="^lora_targets: expected linear layers of the model, got qkv,up, of which it has none"
    ):
        add_adapters(random_model(layers=0, position=None, tie_embeddings=False), 2, 4, ("qkv", "up"))


def test_adapters_of_another_model_are_noted(tmp_path):
    checkpoint_of("llama", tmp_path / "base")
    train(started(tmp_path / "base"), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT.from_pretrained(tmp_path / "base", lora=tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "other")
    with pytest.warns(UserWarning, match="^lora: .*out was trained on .*/base, and is applied to .*/other$"):
        GPT.from_pretrained(tmp_path / "other", lora=tmp_path / "out")
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    cached = tmp_path / "models--someone--Other" / "snapshots" / "abc"
    cached.parent.mkdir(parents=True)
    (tmp_path / "other").rename(cached)
    for said in (None, "", "someone/other"):
        (tmp_path / "out" / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": said}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GPT.from_pretrained(cached, lora=tmp_path / "out")


def test_a_run_without_a_checkpoint_has_nothing_to_adapt():
    with pytest.raises(ValueError, match=r"lora: expected 0 without a checkpoint to start from \(init_from\), got 4"):
        Trainer(TEXT, replace(TINY, lora=4))


def test_bad_adapters(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = random_model(vocabulary=60)
    model.save_pretrained(base)
    lora.mkdir()

    def fails(error, message):
        with pytest.raises(error, match=message):
            GPT.from_pretrained(base, lora=lora)

    fails(FileNotFoundError, "lora: expected adapter_config.json, as PEFT saves it, in the folder .*lora")
    with pytest.raises(FileNotFoundError, match="lora: expected a checkpoint folder, .*none does not exist"):
        GPT.from_pretrained(base, lora=tmp_path / "none")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (lora / ADAPTER_CONFIG).write_text(json.dumps(config))
    fails(FileNotFoundError, "lora: expected adapter_model.safetensors")
    (lora / ADAPTER_WEIGHTS).write_bytes(b"no weights")
    fails(ValueError, "lora: .*adapter_model.safetensors is damaged")
    name = "base_model.model.transformer.h.0.attn.c_proj.lora_"
    good = {f"{name}A.weight": torch.randn(2, 64), f"{name}B.weight": torch.randn(64, 2)}
    changes = {
        "expected lora_A of shape .rank, 64. and lora_B of shape .64, rank., got": {f"{name}B.weight": torch.randn(64, 3)},
        "expected finite numbers in F64 or F32 or F16 or BF16, got torch.float32 or NaN": {
            f"{name}A.weight": torch.full((2, 64), torch.nan)
        },
        "expected finite numbers .* got torch.float8_e4m3fn": {f"{name}A.weight": torch.zeros(2, 64).to(torch.float8_e4m3fn)},
        "expected adapters of linear layers, .* got something": {"something": torch.zeros(1)},
        "expected adapters of this model's linear layers, got one of transformer.h.9.attn": {
            f"{name.replace('.0.', '.9.')}A.weight": torch.zeros(2, 64)
        },
    }
    for message, change in changes.items():
        save_file(good | change, lora / ADAPTER_WEIGHTS)
        fails(ValueError, f"lora: .*{ADAPTER_WEIGHTS}: .*{message}")
    save_file({f"{name}A.weight": good[f"{name}A.weight"]}, lora / ADAPTER_WEIGHTS)
    fails(ValueError, "expected lora_A and lora_B, got lora_A alone")
    save_file({}, lora / ADAPTER_WEIGHTS)
    fails(ValueError, "expected at least one adapter, got none")
    save_file(good, lora / ADAPTER_WEIGHTS)
    for entry in (
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
    ):
        (lora / ADAPTER_CONFIG).write_text(json.dumps(config | entry))
        fails(ValueError, f"lora: .*{ADAPTER_CONFIG}: {next(iter(entry))}: expected")
    (lora / ADAPTER_CONFIG).write_text(json.dumps(config))
    expected = model.blocks[0].attention.out.weight + 2 * good[f"{name}B.weight"] @ good[f"{name}A.weight"]
    assert torch.equal(GPT.from_pretrained(base, lora=lora).blocks[0].attention.out.weight, expected)


def test_all_linear_layers_by_default():
    model = random_model()
    linear = sum(isinstance(layer, torch.nn.Linear) for layer in model.blocks.modules())
    add_adapters(model, 2, 4)
    assert sum(isinstance(layer, LoRALinear) for layer in model.modules()) == linear == 8
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * linear and all("lora_" in name for name in trained)
