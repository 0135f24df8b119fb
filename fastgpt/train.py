"""The trainer: a decoder on one text file, with held-out evaluation, samples, checkpoints and exact resumption.

It runs in one process or, started by torchrun, in several that share each batch: fastgpt/distributed.py.
"""

import copy
import hashlib
import math
import pickle
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fastgpt.checkpoint import TOKENIZER, replacing, resolve
from fastgpt.distributed import Processes, skeleton
from fastgpt.evaluate import evaluate, split
from fastgpt.model import GPT, GPTConfig
from fastgpt.text import Tokenizer

STATE = "training_state.pt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHOW_EVERY = 0.5  # seconds between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Lengths are in tokens; the learning rate falls along a cosine to a tenth of its peak.

    layers: 0 makes a bigram model, which every other one should beat.
    batch_size: windows in a step, those of all processes together.
    dtype: of matrix products and attention: "float32", or "bfloat16" by autocast. Weights and their updates are float32.
    """

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
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("batch_size", "steps", "eval_interval", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        for name in ("layers", "warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.seed >= 2**31:
            raise ValueError(f"seed: expected a number below 2^31, got {self.seed!r}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


class Trainer:
    """Everything a run consists of, between two steps.

    What is random in step i depends on (seed, i) alone, so a resumed run needs no generator states to draw the
    batches and dropout masks that an uninterrupted one draws. A batch is cut into `processes.size * accumulate` parts of
    consecutive windows: each process takes `accumulate` of them, one after the other, and a part's dropout masks depend on
    its place in the batch. So it does not matter who computes a part.

    Args:
        tokenizer, model: to begin with, see `pretrained`; default those of a new character-level model.
        accumulate: parts of a process's share of each batch, whose gradients add up: less memory, the same step.
        processes: see `fastgpt.distributed.joined`.

    Raises: ValueError.
    """

    def __init__(
        self, text: str, config: TrainConfig, device="cpu",
        *, tokenizer: Tokenizer | None = None, model: GPT | None = None, accumulate: int = 1,
        processes: Processes = Processes(),
    ):  # fmt: skip
        parts = processes.size * accumulate
        if accumulate < 1:
            raise ValueError(f"accumulate: expected an integer >= 1, got {accumulate!r}")
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size: expected a multiple of {parts} (processes: {processes.size}, parts in each: {accumulate}), "
                f"got {config.batch_size}"
            )
        self.config, self.device = config, torch.device(device)
        self.accumulate, self.processes = accumulate, processes
        self.text_hash = hashlib.sha256(text.encode()).hexdigest()
        self.tokenizer = tokenizer or Tokenizer.from_corpus(text)
        self.train_tokens, self.held_out = split(torch.tensor(self.tokenizer.encode(text)), config.context)
        torch.manual_seed(config.seed)
        self.model = model or GPT(model_config(config, self.tokenizer.vocab_size))
        self.skeleton = skeleton(self.model) if processes.parallel == "fsdp" else None
        self.forward = processes.spread(self.model, self.device)
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

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's parts of the current step's batch: inputs and targets, (windows, context) each.

        The windows are at random places of the text. As each part comes, dropout's generator is set for it.
        """
        config = self.config
        torch.manual_seed((config.seed << 32) + self.step + 1)
        starts = torch.randint(len(self.train_tokens) - config.context, (config.batch_size, 1))
        seeds = torch.randint(2**62, (config.batch_size,)).tolist()
        share = config.batch_size // self.processes.size
        part = share // self.accumulate
        for first in range(self.processes.rank * share, (self.processes.rank + 1) * share, part):
            windows = self.train_tokens[starts[first : first + part] + torch.arange(config.context + 1)]
            if self.device.type == "cuda":
                windows = windows.pin_memory().to(self.device, non_blocking=True)
            torch.manual_seed(seeds[first])
            yield windows[:, :-1], windows[:, 1:]

    def autocast(self):
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step.

        Returns: its loss, nats per token, and the norm of its gradient before clipping; both over all processes, scalars
            on the device, which may still be computing them.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, (inputs, targets) in enumerate(self.parts(), 1):
            with nullcontext() if i == self.accumulate else self.processes.accumulating(self.forward):
                with self.autocast():
                    logits = self.forward(inputs)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / self.accumulate
                loss.backward()
            total += loss.detach() / self.processes.size
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return self.processes.sum(total), norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def evaluate(self) -> float:
        """The held-out loss, see `evaluate`; all processes take part and get it."""
        with self.autocast():
            return evaluate(
                self.model, self.held_out, self.config.eval_windows, context=self.config.context, processes=self.processes
            )

    def whole(self) -> GPT | None:
        """The model. Where it is sharded, a copy on the CPU of the first process; None for others."""
        if self.processes.parallel != "fsdp":
            return self.model
        weights = self.processes.gathered(self.model.state_dict())
        if not self.processes.first:
            return None
        model = copy.deepcopy(self.skeleton)
        model.load_state_dict(weights, assign=True)
        return model

    def sample(self, num_tokens: int = 200) -> str | None:
        """A sample from the model, begun with the first token of the held-out text; in the first process, others get None."""
        model = self.whole()
        if not self.processes.first:
            return None
        prompt = self.held_out[:1].unsqueeze(0).to(model.token_embedding.weight.device)
        num_tokens = min(num_tokens, self.config.context - 1)
        ids = model.generate(prompt, num_tokens, temperature=0.8, seed=self.config.seed)
        return self.tokenizer.decode(ids[0].tolist())

    def save(self, folder: Path, *, weights: bool) -> None:
        """Writes the state of the run and, with `weights`, the checkpoint that generates. The first process writes.

        `resume` needs both; the checkpoint's weights may be those of an earlier step.
        """
        model, optimizer = self.whole(), self.processes.gathered(self.optimizer.state_dict())
        if not self.processes.first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if weights:
            model.save_pretrained(folder)
            with replacing(folder / TOKENIZER) as temporary:
                self.tokenizer.save(temporary)
        state = {
            "config": asdict(self.config),
            "text_hash": self.text_hash,
            "step": self.step,
            "best_loss": self.best_loss,
            "model": model.state_dict(),
            "optimizer": optimizer,
        }
        with replacing(folder / STATE) as temporary:
            torch.save(state, temporary)

    @classmethod
    def resume(cls, folder: Path, text: str, device="cpu", **options) -> "Trainer":
        """The trainer that `save` wrote, ready for its next step.

        Args:
            options: accumulate and processes, which may be others than before.

        Raises: FileNotFoundError, or ValueError when the state is damaged or belongs to another text.
        """
        path = folder / STATE
        if not path.is_file():
            raise FileNotFoundError(f"resume: expected {STATE} of an earlier run in {folder}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if hashlib.sha256(text.encode()).hexdigest() != state["text_hash"]:
                raise ValueError(f"text: expected the text that the run in {folder} was started with, got another")
            config, model, tokenizer = pretrained(folder, **state["config"])
            trainer = cls(text, config, device, model=model, tokenizer=tokenizer, **options)
            trainer.load(state["model"], state["optimizer"])
            trainer.step, trainer.best_loss = state["step"], state["best_loss"]
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"resume: {path} is damaged: {error}") from error
        return trainer

    def load(self, model: dict, optimizer: dict) -> None:
        """Takes over whole states of model and optimizer, of which this process may have a part."""
        part, own = self.processes.part, self.model.state_dict()
        self.model.load_state_dict({name: part(value, own[name]) for name, value in model.items()})
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            i: {name: part(value, parameters[i]) for name, value in entry.items()} for i, entry in optimizer["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model of a run that begins with random weights."""
    bigram = {"position": None, "tie_embeddings": False} if config.layers == 0 else {}
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=config.context,
        num_layers=config.layers,
        num_heads=config.heads,
        hidden_size=config.width,
        dropout=config.dropout,
        **bigram,
    )


def pretrained(path: str | Path, **given) -> tuple[TrainConfig, GPT, Tokenizer]:
    """What a `Trainer` needs to go on training a checkpoint's model: a folder's, or one of the Hub by its id.

    Args:
        given: settings, as in TrainConfig. The architecture, dropout included, is the checkpoint's; only the context may be
            another, a shorter one.

    Raises: FileNotFoundError, or ValueError when a setting or the tokenizer does not fit the checkpoint's model.
    """
    folder = resolve(path)
    tokenizer, model = Tokenizer.from_folder(folder), GPT.from_pretrained(folder, dtype=torch.float32)
    architecture = model.config
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"init_from: expected a {TOKENIZER} of at most {architecture.vocab_size} tokens, those of the model in {folder}, "
            f"got {tokenizer.vocab_size}"
        )
    fixed = {
        "layers": architecture.num_layers, "heads": architecture.num_heads,
        "width": architecture.hidden_size, "dropout": architecture.dropout,
    }  # fmt: skip
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, that of the model in {folder}, got {given[name]}")
    longest = architecture.context_length
    given.setdefault("context", min(TrainConfig.context, longest))
    if given["context"] > longest:
        raise ValueError(f"context: expected at most {longest}, that of the model in {folder}, got {given['context']}")
    return TrainConfig(**(given | fixed)), model, tokenizer


def train(trainer: Trainer, folder: Path) -> None:
    """Runs what is left of `trainer.config.steps`, in each of the trainer's processes.

    At every `eval_interval` steps and at the end it evaluates, shows a sample and saves to `folder`; the weights kept
    there are those with the lowest held-out loss. Ctrl-C or SIGTERM, to any process, ends the run after the current step
    in the same way; a second one ends it at once.
    """
    config, processes = trainer.config, trainer.processes
    trainer.model.train()
    stop = False
    with (
        processes.interruptible() as interrupted,
        tqdm(total=config.steps, initial=trainer.step, unit="step", disable=not processes.first) as bar,
    ):
        since, counted = time.perf_counter(), trainer.step
        while trainer.step < config.steps and not stop:
            result = trainer.train_step()
            stop = interrupted()
            pause = trainer.step % config.eval_interval == 0 or trainer.step == config.steps or stop
            if processes.first and (pause or time.perf_counter() - since > SHOW_EVERY):
                loss, norm = torch.stack(result).tolist()  # waits for the device
                tokens = (trainer.step - counted) * config.batch_size * config.context
                speed = tokens / (time.perf_counter() - since)
                bar.set_postfix_str(f"loss {loss:.3f}, gradient norm {norm:.2f}, {speed:,.0f} tokens/s", refresh=False)
                since, counted = time.perf_counter(), trainer.step
            bar.update()
            if pause:
                held_out = trainer.evaluate()
                best = held_out < trainer.best_loss
                trainer.best_loss = min(held_out, trainer.best_loss)
                trainer.save(folder, weights=best)
                text = trainer.sample()
                if processes.first:
                    bar.write(
                        f"\nstep {trainer.step}: loss {loss:.4f}, held-out loss {held_out:.4f} nats per token"
                        f"{', the lowest so far: saved' if best else f' (lowest {trainer.best_loss:.4f})'}\n"
                        f"{text}\n"
                    )
                since = time.perf_counter()
    if processes.first:
        if stop:
            print(f"Stopped after step {trainer.step} of {config.steps}; continue with --resume.")
        print(f"{folder}: weights with held-out loss {trainer.best_loss:.4f} nats per token.")
