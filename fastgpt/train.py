"""The trainer: a decoder on one text file, with held-out evaluation, samples, checkpoints and exact resumption."""

import hashlib
import math
import pickle
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fastgpt.checkpoint import TOKENIZER, replacing
from fastgpt.model import GPT, GPTConfig
from fastgpt.text import Tokenizer

STATE = "training_state.pt"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Lengths are in tokens; the learning rate falls along a cosine to a tenth of its peak."""

    layers: int = 6
    heads: int = 6
    width: int = 192
    context: int = 256
    dropout: float = 0.1
    batch_size: int = 16
    steps: int = 2000
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_interval: int = 200
    eval_windows: int = 256
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "steps", "eval_interval", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.seed >= 2**31:
            raise ValueError(f"seed: expected a number below 2^31, got {self.seed!r}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")


class Trainer:
    """Everything a run consists of, between two steps.

    What is random in step i depends on (seed, i) alone, so a resumed run needs no generator states to draw the
    batches and dropout masks that an uninterrupted one draws.
    """

    def __init__(self, text: str, config: TrainConfig, device="cpu"):
        self.config, self.device = config, torch.device(device)
        self.text_hash = hashlib.sha256(text.encode()).hexdigest()
        self.tokenizer = Tokenizer.from_corpus(text)
        self.train_tokens, self.held_out = split(torch.tensor(self.tokenizer.encode(text)), config.context)
        torch.manual_seed(config.seed)
        model_config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            context_length=config.context,
            num_layers=config.layers,
            num_heads=config.heads,
            hidden_size=config.width,
            dropout=config.dropout,
        )
        self.model = GPT(model_config).to(self.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.step = 0  # steps done
        self.best_loss = math.inf  # lowest held-out loss so far, nats per token

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth of the peak."""
        config = self.config
        if step < config.warmup:
            return config.learning_rate * (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the current step, (batch, context) each: windows of the text at random places."""
        context = self.config.context
        starts = torch.randint(len(self.train_tokens) - context, (self.config.batch_size, 1))
        windows = self.train_tokens[starts + torch.arange(context + 1)].to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def train_step(self) -> float:
        """One optimizer step; returns its loss, nats per token."""
        torch.manual_seed((self.config.seed << 32) + self.step + 1)
        inputs, targets = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def evaluate(self) -> float:
        return evaluate(self.model, self.held_out, self.config.eval_windows)

    def sample(self, num_tokens: int = 200) -> str:
        """A sample from the model, begun with the first token of the held-out text."""
        prompt = self.held_out[:1].unsqueeze(0).to(self.device)
        num_tokens = min(num_tokens, self.config.context - 1)
        ids = self.model.generate(prompt, num_tokens, temperature=0.8, seed=self.config.seed)
        return self.tokenizer.decode(ids[0].tolist())

    def save(self, folder: Path, *, weights: bool) -> None:
        """Writes what `resume` needs and, with `weights`, the checkpoint that generates."""
        folder.mkdir(parents=True, exist_ok=True)
        if weights:
            self.model.save_pretrained(folder)
            with replacing(folder / TOKENIZER) as temporary:
                self.tokenizer.save(temporary)
        state = {
            "config": asdict(self.config),
            "text_hash": self.text_hash,
            "step": self.step,
            "best_loss": self.best_loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(folder / STATE) as temporary:
            torch.save(state, temporary)

    @classmethod
    def resume(cls, folder: Path, text: str, device="cpu") -> "Trainer":
        """The trainer that `save` wrote, ready for its next step.

        Raises: FileNotFoundError, or ValueError when the state is damaged or belongs to another text.
        """
        path = folder / STATE
        if not path.is_file():
            raise FileNotFoundError(f"resume: expected {STATE} of an earlier run in {folder}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            trainer = cls(text, TrainConfig(**state["config"]), device)
            if trainer.text_hash != state["text_hash"]:
                raise ValueError(f"text: expected the text that the run in {folder} was started with, got another")
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.step, trainer.best_loss = state["step"], state["best_loss"]
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"resume: {path} is damaged: {error}") from error
        return trainer


def split(tokens: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 90% of the tokens to train on and the last 10%, held out. Raises ValueError when either is too short."""
    held_out = len(tokens) // 10
    if held_out < 2 or len(tokens) - held_out <= context:
        needed = max(20, context + 1 + context // 9)  # the smallest number that passes
        raise ValueError(f"text: expected at least {needed} tokens for a context of {context}, got {len(tokens)}")
    return tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]


@torch.inference_mode()
def evaluate(model, tokens: torch.Tensor, max_windows: int | None = None, cache_dtype: torch.dtype | None = None) -> float:
    """Mean loss of predicting each of `tokens` (N,) but the first, in nats per token.

    The text is read in windows of the model's context that do not overlap: all of them, or `max_windows` that are
    spread evenly. With a `cache_dtype`, through a cache of it: what rounding keys and values costs.
    """
    context, device = model.config.context_length, model.token_embedding.weight.device
    starts = list(range(0, len(tokens) - 1, context))
    if max_windows is not None and len(starts) > max_windows:
        starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
    training = model.training
    model.eval()
    total = count = 0
    for start in starts:
        window = tokens[start : start + context + 1].to(device)
        cache = None if cache_dtype is None else model.new_cache(1, cache_dtype=cache_dtype)
        logits = model(window[None, :-1], cache=cache)[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    model.train(training)
    return total / count


def train(trainer: Trainer, folder: Path) -> None:
    """Runs what is left of `trainer.config.steps`.

    At every `eval_interval` steps and at the end it evaluates, shows a sample and saves to `folder`; the weights kept
    there are those with the lowest held-out loss. Ctrl-C ends the run after the current step in the same way; a second
    Ctrl-C ends it at once.
    """
    config = trainer.config
    trainer.model.train()
    tokens_per_step = config.batch_size * config.context
    with interruptible() as interrupted, tqdm(total=config.steps, initial=trainer.step, unit="step") as bar:
        while trainer.step < config.steps and not interrupted:
            started = time.perf_counter()
            loss = trainer.train_step()
            speed = tokens_per_step / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if trainer.step % config.eval_interval == 0 or trainer.step == config.steps or interrupted:
                held_out = trainer.evaluate()
                best = held_out < trainer.best_loss
                trainer.best_loss = min(held_out, trainer.best_loss)
                trainer.save(folder, weights=best)
                bar.write(
                    f"\nstep {trainer.step}: loss {loss:.4f}, held-out loss {held_out:.4f} nats per token"
                    f"{', the lowest so far: saved' if best else f' (lowest {trainer.best_loss:.4f})'}\n"
                    f"{trainer.sample()}\n"
                )
    if interrupted:
        print(f"Stopped after step {trainer.step} of {config.steps}; continue with --resume.")
    print(f"{folder}: weights with held-out loss {trainer.best_loss:.4f} nats per token.")


@contextmanager
def interruptible():
    """Yields a list that is empty until Ctrl-C is pressed; pressed again, it interrupts as usual."""
    interrupted = []

    def remember(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
