"""The trainer: it learns, resumes to the same numbers, goes on from checkpoints, and refuses what it cannot do."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tokenizers
import torch
from models import random_model
from training_runs import TEXT, TINY, weights

from fastgpt import GPT
from fastgpt.model.moe import load_balancing_loss, recorded_router_logits
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.config import TrainConfig, model_config
from fastgpt.training.evaluation import evaluate, split
from fastgpt.training.loop import train
from fastgpt.training.trainer import Trainer, pretrained


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(dtype, tmp_path):
    trainer = Trainer(TEXT, replace(TINY, steps=150, learning_rate=5e-3, eval_interval=50, dtype=dtype))
    before = trainer.evaluate()
    train(trainer, tmp_path)
    assert abs(before - math.log(trainer.tokenizer.vocab_size)) < 0.2
    assert trainer.best_loss < 0.5 * before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "training_state.pt"]
    # What was saved is the model with the lowest held-out loss.
    model, tokenizer = GPT.from_pretrained(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")
    held_out = split(torch.tensor(tokenizer.encode(TEXT)), 16)[1]
    with trainer.autocast():
        assert evaluate(model, held_out) == trainer.best_loss


def test_a_resumed_run_matches_an_uninterrupted_one(tmp_path):
    config = replace(TINY, dropout=0.2)
    straight = Trainer(TEXT, config)
    straight.model.train()
    losses = [straight.train_step() for _ in range(30)]

    first = Trainer(TEXT, config)
    first.model.train()
    resumed_losses = [first.train_step() for _ in range(13)]
    first.save(tmp_path, weights=True)
    torch.rand(5)  # the global generator's state must not matter
    second = Trainer.resume(tmp_path, TEXT)
    second.model.train()
    resumed_losses += [second.train_step() for _ in range(17)]

    assert losses == resumed_losses
    assert second.step == 30
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_evaluation_and_sampling_do_not_disturb_the_run(tmp_path):
    """Two runs that differ only in how often they are looked at."""
    config = replace(TINY, dropout=0.2, steps=12)
    often, once = (Trainer(TEXT, replace(config, eval_interval=interval)) for interval in (2, 12))
    train(often, tmp_path / "often")
    train(once, tmp_path / "once")
    for name, weight in weights(often).items():
        assert torch.equal(weight, weights(once)[name]), name


@pytest.mark.slow
def test_no_layers_are_a_bigram_model(tmp_path):
    """Each token predicts the next alone: what is left is the text's own entropy of a character given the one before."""
    config = replace(TINY, layers=0, dropout=0.0, steps=300, learning_rate=3e-2, eval_interval=300)
    trainer = Trainer(TEXT, config)
    train(trainer, tmp_path)
    model, ids = GPT.from_pretrained(tmp_path), trainer.held_out[None, :16]
    assert torch.equal(model(ids)[0, -1], model(ids * torch.eye(16, dtype=torch.int64)[-1])[0, -1])
    pairs = torch.zeros(model.config.vocab_size, model.config.vocab_size)
    pairs.index_put_((trainer.held_out[:-1], trainer.held_out[1:]), torch.ones(()), accumulate=True)
    entropy = -torch.special.xlogy(pairs, pairs / pairs.sum(1, keepdim=True)).nansum().item() / pairs.sum().item()
    assert entropy < trainer.best_loss < 1.05 * entropy


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch():
    """But for rounding: sums in another order err as much as in the usual order."""
    config = replace(TINY, layers=2, dropout=0.0)

    def curves(accumulate, dtype):
        """Losses and norms of gradients, step by step."""
        trainer = Trainer(TEXT, config, accumulate=accumulate)
        trainer.model.train().to(dtype)
        values = [[value.item() for value in trainer.train_step()] for _ in range(6)]
        return torch.tensor(values, dtype=dtype).unbind(1)

    numerics.check(curves(4, torch.float32), lambda: curves(1, torch.float64))


def test_bfloat16_is_for_products_only():
    trainer = Trainer(TEXT, config := replace(TINY, dropout=0.0, dtype="bfloat16"))

    def in_double():
        high = Trainer(TEXT, config)
        high.model.double()
        high.autocast = nullcontext
        return high.train_step()[0]

    products = []
    trainer.model.register_forward_hook(lambda model, inputs, logits: products.append(logits.dtype))
    loss, _ = trainer.train_step()
    numerics.check(loss, in_double, arithmetic=torch.bfloat16, name="loss")
    assert products == [torch.bfloat16]
    moments = [moment for state in trainer.optimizer.state.values() for moment in state.values()]
    assert {tensor.dtype for tensor in (*trainer.model.parameters(), *moments)} == {torch.float32}


def test_weight_decay_is_on_matrices_only():
    trainer = Trainer(TEXT, TINY)
    decayed, others = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(trainer.model.parameters()))


def test_learning_rate_warms_up_and_follows_a_cosine():
    trainer = Trainer(TEXT, replace(TINY, steps=1000, warmup=100, learning_rate=1.0))
    rates = [trainer.learning_rate(step) for step in range(1000)]
    assert rates[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert rates[550] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert rates[99:] == sorted(rates[99:], reverse=True)


def test_the_last_tenth_is_held_out():
    train_tokens, held_out = split(torch.arange(1005), 16)
    assert torch.equal(torch.cat([train_tokens, held_out]), torch.arange(1005)) and len(held_out) == 100


def test_evaluation_counts_every_token_once():
    model = random_model(context=8)
    tokens = torch.randint(65, (30,), generator=torch.Generator().manual_seed(0))
    losses = []
    for target in range(1, 30):
        start = (target - 1) // 8 * 8
        logits = model(tokens[None, start:target])[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[target]).item())
    assert evaluate(model, tokens) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a decoder of random weights and a tokenizer of pairs of characters, fewer than the decoder has."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = sorted(set(TEXT))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    folder = tmp_path / "checkpoint"
    random_model(vocabulary=64, context=32, width=32, dropout=0.3).save_pretrained(folder)
    Tokenizer(backend).save(folder / "tokenizer.json")
    return folder


def test_fine_tuning_starts_from_the_checkpoint(checkpoint, tmp_path):
    config, model, tokenizer = pretrained(checkpoint, context=16, batch_size=8, steps=20, warmup=0)
    assert (config.layers, config.heads, config.width, config.context) == (2, 4, 32, 16)
    trainer = Trainer(TEXT, config, model=model, tokenizer=tokenizer)
    ids = torch.tensor(Tokenizer.load(checkpoint / "tokenizer.json").encode(TEXT))
    assert len(ids) < 0.7 * len(TEXT)
    untrained = evaluate(GPT.from_pretrained(checkpoint), split(ids, 16)[1], context=16)
    assert trainer.evaluate() == untrained
    assert config.dropout == trainer.model.config.dropout == 0.3

    train(trainer, tmp_path / "run")
    assert trainer.best_loss < 0.9 * untrained
    assert GPT.from_pretrained(tmp_path / "run").config.context_length == 32
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").encode(TEXT) == ids.tolist()
    resumed = Trainer.resume(tmp_path / "run", TEXT)
    assert torch.equal(resumed.held_out, trainer.held_out)
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_settings_that_do_not_fit_the_checkpoint(checkpoint):
    assert pretrained(checkpoint)[0].context == 32  # not TrainConfig's 256
    with pytest.raises(ValueError, match="width: expected 32, that of the model in .*checkpoint, got 64"):
        pretrained(checkpoint, width=64)
    with pytest.raises(ValueError, match="context: expected at most 32, that of the model in .*checkpoint, got 33"):
        pretrained(checkpoint, context=33)
    random_model(vocabulary=59).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="init_from: expected a tokenizer.json of at most 59 tokens, .* got 60"):
        pretrained(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer: expected the file .*tokenizer.json"):
        pretrained(checkpoint)
    with pytest.raises(FileNotFoundError, match="^init_from: expected a checkpoint folder, .*/none does not exist"):
        pretrained(checkpoint / "none")


@pytest.mark.parametrize("setting", [{"layers": 10**8}, {"width": 10**8, "heads": 1}, {"context": 10**12}], ids=str)
def test_errors_of_the_architecture_name_the_setting(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"^{name}: expected an integer .*, got {value}$"):
        model_config(replace(TINY, **setting), vocab_size=65)


def test_bad_text(tmp_path):
    with pytest.raises(ValueError, match="text: expected at least 285 tokens for a context of 256, got 45"):
        Trainer("the quick brown fox jumps over the lazy dog.\n", TrainConfig())
    trainer = Trainer(TEXT, TINY)
    trainer.save(tmp_path, weights=False)
    with pytest.raises(ValueError, match="text: expected the text that the run in .* was started with"):
        Trainer.resume(tmp_path, TEXT + "more")


def test_text_of_just_the_length_that_the_error_asks_for():
    with pytest.raises(ValueError, match="at least 285 tokens"):
        split(torch.zeros(284), 256)
    assert len(split(torch.zeros(285), 256)[0]) == 257


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 1.5}, {"context": 0}, {"heads": True}, {"learning_rate": math.nan}, {"dropout": 1.0}, {"seed": "a"},
        {"weight_decay": math.inf}, {"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"grad_clip": math.nan}, {"dtype": "float16"}, {"layers": -1},
    ],
)  # fmt: skip
def test_bad_settings(change):
    (name,) = change
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        replace(TINY, **change)


def test_a_run_that_diverges_at_once_can_be_resumed(tmp_path):
    trainer = Trainer(TEXT, replace(TINY, learning_rate=1e30, grad_clip=1e30, warmup=0))
    with pytest.raises(FloatingPointError, match="diverged by step 20.*holds step 0"):
        train(trainer, tmp_path)
    resumed = Trainer.resume(tmp_path, TEXT, learning_rate=1e-3, grad_clip=1.0)
    assert all(torch.equal(weight, weights(Trainer(TEXT, TINY))[name]) for name, weight in weights(resumed).items())


def test_more_steps_go_on_at_the_rate_of_a_longer_run(tmp_path):
    trainer = Trainer(TEXT, replace(TINY, steps=8))
    train(trainer, tmp_path)
    longer = Trainer.resume(tmp_path, TEXT, steps=12)
    assert longer.step == 8 and longer.learning_rate(8) == Trainer(TEXT, replace(TINY, steps=12)).learning_rate(8)
    train(longer, tmp_path)
    assert Trainer.resume(tmp_path, TEXT).step == 12
    with pytest.raises(ValueError, match="steps: expected at least 12, .* got 11"):
        Trainer.resume(tmp_path, TEXT, steps=11)


# Mixtures of experts


def moe_trainer(**settings):
    tokenizer = Tokenizer.from_corpus(TEXT)
    model = random_model(
        vocabulary=tokenizer.vocab_size, context=16, width=32, num_experts=4, experts_per_token=1, expert_size=16
    )
    return Trainer(TEXT, replace(TINY, context=16, steps=100, **settings), model=model, tokenizer=tokenizer)


def test_a_balance_loss_balances_the_loads_of_experts():
    def imbalance(trainer):
        with torch.no_grad(), recorded_router_logits(trainer.model) as logits:
            trainer.model(trainer.held_out[:176].view(-1, 16))
        return load_balancing_loss(logits, 1).item()

    found = []
    for weight in (0.0, 1.0):
        trainer = moe_trainer(balance_loss=weight, learning_rate=5e-3)
        trainer.model.train()
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.mlp.router.weight[0] = 0.2 * block.mlp.router.weight[0].sign()
        losses = [trainer.train_step()[0].item() for _ in range(30)]
        assert losses[-1] < losses[0]
        found.append(imbalance(trainer))
    assert 1 <= found[1] < found[0]


def test_a_balance_loss_is_of_the_logits_of_each_step():
    trainer = moe_trainer(balance_loss=0.5)
    trainer.model.train()
    inputs, targets = next(trainer.micro_batches())
    with recorded_router_logits(trainer.model) as logits:
        loss = torch.nn.functional.cross_entropy(trainer.model(inputs).flatten(0, 1), targets.flatten())
    (loss + 0.5 * load_balancing_loss(logits, 1)).backward()
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    reported, norm = trainer.train_step()
    torch.testing.assert_close(reported, loss.detach())
    torch.testing.assert_close(norm, torch.stack([x.norm() for x in gradients]).norm())


def test_a_balance_loss_needs_experts():
    with pytest.raises(ValueError, match="balance_loss: expected 0 for a model without experts, got 0.1"):
        Trainer(TEXT, replace(TINY, balance_loss=0.1))
    with pytest.raises(ValueError, match="balance_loss: expected a finite number >= 0, got -1"):
        replace(TINY, balance_loss=-1)
