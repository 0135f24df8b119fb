"""Looking inside: the activations are those that make the logits, the patterns those of transformers."""

import json
import shutil
import sys

import pytest
import torch
from models import random_ids, random_model

from fastgpt import GPT, SHIPPED_MODEL, generate, run_with_cache
from fastgpt.cli.main import main
from fastgpt.model.inspection import draw_attention, most_likely, text_of
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer

LLAMA = {
    "norm": "rms", "gated": True, "activation": "silu", "position": "rotary", "rope": Rope(16), "num_kv_heads": 2,
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": True,
}  # fmt: skip
FAMILIES = {
    "gpt2": {},
    "llama": LLAMA,
    "gemma2": LLAMA | {"attention_softcap": 2.0, "attention_scale": 0.3, "windows": (5, None), "post_norms": True},
    "encoder": {"causal": False},
}
T = 12


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_make_the_output_and_the_logits_are_the_same(family):
    model = random_model(**FAMILIES[family])
    config, ids = model.config, random_ids(model, 3, T)
    logits, activations = run_with_cache(model, ids)
    assert torch.equal(logits, model(ids)) and torch.equal(model.logits(activations["blocks.1.output"]), logits)
    yardsticks = numerics.simulate(lambda: run_with_cache(model.double(), ids)[1])
    group = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        q, k, v, pattern, output = (
            activations[f"blocks.{layer}.attention.{part}"] for part in ("q", "k", "v", "pattern", "output")
        )
        assert q.shape == output.shape == (3, 4, T, 16) and k.shape == v.shape == (3, config.num_kv_heads, T, 16)
        assert pattern.shape == (3, 4, T, T) and pattern.dtype == torch.float32
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, T))
        # Above the diagonal and beyond the window there is nothing; everywhere else there is something.
        seen = torch.ones(T, T, dtype=torch.bool)
        if config.causal:
            seen = seen.tril().triu(1 - (config.window(layer) or T))
        assert torch.equal(pattern > 0, seen.expand(3, 4, T, T))
        name = f"blocks.{layer}.attention.output"
        numerics.check(pattern @ v.repeat_interleave(group, 1), yardsticks[name])
        scores = q @ k.repeat_interleave(group, 1).transpose(-2, -1) * (config.attention_scale or 0.25)
        if config.attention_softcap:
            scores = 2.0 * torch.tanh(scores / 2.0)
        torch.testing.assert_close(pattern, scores.masked_fill(~seen, float("-inf")).softmax(-1))


@torch.no_grad()
def test_names_in_the_order_of_computation():
    model = random_model(cross_attention=True)
    ids, states = random_ids(model, 2, T), torch.randn(2, 5, 64)
    _, activations = run_with_cache(model, ids, encoder_states=states, encoder_lengths=[5, 2])
    attention = ["q", "k", "v", "pattern", "output"]
    block = [*(f"{kind}.{part}" for kind in ("attention", "cross_attention") for part in attention), "middle", "output"]
    assert list(activations) == ["embedding", *(f"blocks.{i}.{name}" for i in range(2) for name in block), "norm"]
    pattern = activations["blocks.1.cross_attention.pattern"]
    assert pattern.shape == (2, 4, T, 5) and not pattern[1, :, :, 2:].any() and (pattern[0] > 0).all()
    output = activations["blocks.1.cross_attention.output"]
    torch.testing.assert_close(pattern @ activations["blocks.1.cross_attention.v"], output)


@torch.no_grad()
def test_the_residual_stream():
    """What each part of a block adds to it."""
    model = random_model()
    logits, activations = run_with_cache(model, random_ids(model, 2, T))
    streams = [activations["embedding"], activations["blocks.0.output"]]
    for i, block in enumerate(model.blocks):
        heads = activations[f"blocks.{i}.attention.output"].transpose(1, 2).flatten(2)
        torch.testing.assert_close(streams[i] + block.attention.out(heads), activations[f"blocks.{i}.middle"])
        after = block.mlp(activations[f"blocks.{i}.middle"], block.mlp_norm, activations[f"blocks.{i}.middle"])
        torch.testing.assert_close(after, activations[f"blocks.{i}.output"])
    torch.testing.assert_close(activations["norm"] @ model.token_embedding.weight.T, logits)


def test_looking_leaves_no_trace_and_gradients_flow():
    model = random_model()
    ids = random_ids(model, 2, T)
    logits, activations = run_with_cache(model, ids)
    activations["blocks.0.attention.pattern"][0, 1, 5, 2].backward()
    assert model.blocks[0].attention.qkv.weight.grad.abs().max() > 0 and model.blocks[1].mlp.up.weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="ids: expected token ids from 0 to 64"):
        run_with_cache(model, ids + 60)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_bfloat16():
    model = random_model(**LLAMA).bfloat16()
    logits, activations = run_with_cache(model, random_ids(model, 2, T))
    assert logits.dtype == activations["blocks.0.attention.q"].dtype == torch.bfloat16
    pattern = activations["blocks.0.attention.pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, T))  # of fp32


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> a small model of transformers' and the folder with it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    tokens = {"vocab_size": 65, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    gemma2 = {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **tokens),
        "llama": transformers.LlamaConfig(**small, **tokens),
        "gemma2": transformers.Gemma2Config(**small, **gemma2, **tokens),
    }
    result = {}
    for family, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        result[family] = model, folder
    return result


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_activations_match_transformers(family, checkpoints):
    """Hidden states and attention patterns."""
    theirs, folder = checkpoints[family]
    model, ids = GPT.from_pretrained(folder), torch.randint(65, (2, 20), generator=torch.Generator().manual_seed(0))

    def reference():
        with numerics.only_double_precision():
            result = theirs.double()(ids, output_hidden_states=True, output_attentions=True)
        return list(result.hidden_states), list(result.attentions)

    hidden, patterns = numerics.simulate(reference)
    theirs.float()
    logits, states = model(ids, output_hidden_states=True)
    assert torch.equal(logits, model(ids)) and len(states) == 3
    numerics.check(states, hidden)
    _, activations = run_with_cache(model, ids)
    names = ["embedding", "blocks.0.output", "norm"]
    assert all(torch.equal(activations[name], state) for name, state in zip(names, states, strict=True))
    for layer in range(2):
        pattern = activations[f"blocks.{layer}.attention.pattern"]
        numerics.check(pattern, patterns[layer])


@torch.no_grad()
def test_hidden_states_with_a_cache():
    model = random_model()
    ids = random_ids(model, 2, T)
    cache = model.new_cache(2)
    pieces = [model(piece, cache=cache, output_hidden_states=True)[1] for piece in ids.split([7, 5], dim=1)]
    _, whole = model(ids, output_hidden_states=True)
    for first, second, expected in zip(*pieces, whole):
        torch.testing.assert_close(torch.cat([first, second], dim=1), expected)


# The command


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of `fastgpt inspect`."""
    try:
        main(["inspect", *map(str, arguments)])
        status = 0
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect_shows_the_next_token_predictions(capsys):
    status, out, _ = run(capsys, "ROMEO:\nO", "--top", 3)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "8 tokens with their ids:"
    assert lines[1] == r"    'R' 30  'O' 27  'M' 25  'E' 17  'O' 27  ':' 10  '\n' 0  'O' 27"
    table = [line for line in lines if "%" in line]
    assert len(table) == 4 and table[-1].endswith("the other 62")
    shares = [float(line.partition("%")[0].split()[-1]) for line in table]
    assert sum(shares) == pytest.approx(100, abs=0.01) and sorted(shares[:3], reverse=True) == shares[:3]
    assert len({line.index("%") for line in table}) == 1  # aligned
    token, (_, number, *_) = table[0].partition("%")[2].strip(), table[0].split()
    assert lines[-1] == f"Greedy decoding takes {token} (id {number})."


def test_inspect_agrees_with_generate(capsys):
    report = json.loads(run(capsys, "ROMEO:", "--json", "--top", 65)[1])
    assert [token["text"] for token in report["tokens"]] == list("ROMEO:") and len(report["next"]) == 65
    model, tokenizer = GPT.from_pretrained(SHIPPED_MODEL), Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    assert report["greedy"] == report["next"][0] and report["greedy"]["id"] == generate(model, ids, 1)[0, -1]
    with torch.no_grad():
        logits = model(ids)[0, -1]
    for row in report["next"]:
        assert row["logit"] == pytest.approx(logits[row["id"]].item(), abs=1e-4)
        assert row["probability"] == pytest.approx(logits.softmax(0)[row["id"]].item(), abs=1e-5)
        assert row["text"] == tokenizer.decode([row["id"]])


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_inspect_draws_attention(name, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / name
    status, out, error = run(capsys, "What $light$ through\n", "--attention", path, "--layer", 5, "--head", 2)
    assert (status, error) == (0, "") and path.stat().st_size > 5000 and "Greedy decoding takes" in out
    assert path.read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    if name.endswith("svg"):
        assert "layer 5, head 2" in path.read_text()


def test_a_plot_is_not_written_to_another_file(tmp_path):
    """matplotlib would add .png to the name."""
    with pytest.raises(ValueError, match="^attention: expected a file name that ends with its format, such as .png, got "):
        draw_attention(torch.eye(2), ["a", "b"], tmp_path / "plot")
    assert not list(tmp_path.iterdir())


def test_attention_plots_show_the_pattern(tmp_path):
    """Read back: dark where the weight is, white elsewhere."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    pattern = torch.zeros(10, 10)
    pattern[:, 0] = 1.0
    draw_attention(pattern, list("abcdefghij"), tmp_path / "first.png")
    draw_attention(pattern.flip(1), list("abcdefghij"), tmp_path / "last.png")
    first, last = (imread(tmp_path / name)[..., :3] for name in ("first.png", "last.png"))
    dark = [(picture[..., 0] < 0.1) & (picture[..., 2] > 0.3) & (picture[..., 2] < 0.5) for picture in (first, last)]
    columns = [mask[mask.any(1).nonzero()[0][5]].nonzero()[0] for mask in dark]
    middle = [row[row < 0.8 * first.shape[1]].mean() for row in columns]  # left of the color bar
    assert middle[0] < middle[1]


def test_names_of_tokens():
    """A token's text is what it adds to the one before; its name where that is not whole characters, or nothing."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=300
    )
    backend.train_from_iterator(["the cat and the hat and the bat"] * 9, trainer)
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("the cat é")
    texts = [text_of(tokenizer, *pair) for pair in zip(ids, [None, *ids])]
    assert texts[:2] == ["the", " cat"] and texts[-2:] == ["Ã", "©"]
    assert text_of(tokenizer, 0, ids[0]) == "<end>" and text_of(tokenizer, 4000) == "<token 4000>"


def test_ties_go_to_the_first_as_in_greedy_decoding():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert [token for token, _, _ in most_likely(logits, 3)] == [1, 3, 2] and logits.argmax() == 1


ERRORS = [
    ([""], "prompt: expected at least one character, got an empty prompt"),
    (["naïve"], "prompt: expected only the 65 characters"),
    (["A" * 600], "prompt: expected a prompt of at most 512 tokens, the model's context, got 600"),
    (["A", "--top", "0"], "top: expected an integer >= 1, got 0"),
    (["A", "--model", "/nowhere"], "expected a checkpoint folder, /nowhere does not exist"),
    (["A", "--attention", "a.png", "--layer", "6"], "layer: expected a number from 0 to 5, got 6"),
    (["A", "--attention", "a.png", "--head", "-1"], "head: expected a number from 0 to 2, got -1"),
    (["A", "--attention", "a.xyz"], "attention: expected a file format that matplotlib supports, got a.xyz"),
    (["A", "--attention", "/nowhere/a.png"], "attention: expected a file that can be written to, got /nowhere/a.png"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    if "--attention" in arguments:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    status, out, error = run(capsys, *arguments)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ") and len(error.splitlines()) == 1
    assert message in error and not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, error = run(capsys, "A", "--attention", "a.png")
    assert status == 2 and "plotting needs matplotlib, which is not installed: pip install matplotlib" in error
    assert run(capsys, "A")[0] == 0


def test_an_encoder_has_no_next_token(capsys, tmp_path):
    random_model(causal=False).save_pretrained(tmp_path)
    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path)
    status, _, error = run(capsys, "A", "--model", tmp_path)
    assert status == 2 and "model: expected a causal model" in error
