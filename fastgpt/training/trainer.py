"""The trainer: a decoder on one text file, with held-out evaluation, samples, checkpoints and exact resumption.

It runs in one process or, started by torchrun, in several that share each batch: fastgpt/training/processes.py.
"""

import copy
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from fastgpt import folders, schema
from fastgpt.checkpoints import transformers_format
from fastgpt.checkpoints.transformers_format import STATE, TOKENIZER, replacing, resolve
from fastgpt.checks import reason_of, require_choice, require_integer, require_number, require_path, require_tensor
from fastgpt.generation.generate import generate
from fastgpt.model.config import GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.corpus import summarize, tokenize
from fastgpt.training.evaluation import evaluate, split
from fastgpt.training.processes import Processes, skeleton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHOW_EVERY = 0.5  # seconds between two looks at the loss, each of which waits for the device
LOCK = "training.lock"  # in a run's folder while the run goes on
CHECK_INTERVAL = 20  # steps between two looks at whether the run has diverged, which all processes take together


def setting(default, meaning: str):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, each with its meaning, which `fastgpt train --help` shows. Lengths are in tokens.

    dtype: of matrix products and attention: "float32", or "bfloat16" by autocast. Weights and their updates are float32.

    Raises: TypeError or ValueError that begins with the name of the setting.
    """

    layers: int = setting(6, "blocks of the decoder; 0 makes a bigram model, which every other one should beat")
    heads: int = setting(6, "attention heads, which divide the width")
    width: int = setting(192, "features of each token")
    context: int = setting(256, "tokens that the model sees at once, and of each window it is trained on")
    dropout: float = setting(0.1, "probability with which activations are zeroed in training")
    batch_size: int = setting(16, "windows in a step, those of all processes together")
    steps: int = setting(2000, "optimizer steps of the whole run; with --resume, more extend it")
    learning_rate: float = setting(1e-3, "peak of the learning rate, which then falls along a cosine to a tenth of it")
    warmup: int = setting(100, "steps in which the learning rate rises to its peak")
    weight_decay: float = setting(0.1, "AdamW's, of matrices only")
    grad_clip: float = setting(1.0, "norm that a step's gradient is scaled down to if it has a larger one")
    eval_interval: int = setting(200, "steps between evaluations, each of which shows a sample and saves")
    eval_windows: int = setting(256, "windows of the held-out text that are evaluated, at most")
    seed: int = setting(0, "of the initial weights, batches and dropout")
    dtype: str = setting("float32", f"of matrix products and attention, not of weights: {', '.join(DTYPES)}")

    def __post_init__(self):
        checked = {name: require_integer(name, getattr(self, name), 1) for name in (
            "heads", "width", "context", "batch_size", "steps", "eval_interval", "eval_windows",
        )}  # fmt: skip
        checked |= {name: require_integer(name, getattr(self, name), 0) for name in ("layers", "warmup")}
        checked |= {name: require_number(name, getattr(self, name), above=0) for name in ("learning_rate", "grad_clip")}
        checked["dropout"] = require_number("dropout", self.dropout, 0, below=1)
        checked["weight_decay"] = require_number("weight_decay", self.weight_decay, 0)
        checked["seed"] = require_integer("seed", self.seed, 0, 2**31 - 1)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        for name, value in checked.items():  # NumPy's numbers as Python's
            object.__setattr__(self, name, value)


ANYTHING = schema.Field(lambda name, value: value)


def _dict_of(kind: type, entry: schema.Field = ANYTHING) -> schema.Field:
    """A dict from keys of one type."""

    def check(name, value):
        if not isinstance(value, dict):
            raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
        for key in value:
            if type(key) is not kind:
                raise TypeError(f"{name}: expected keys of type {kind.__name__}, got {key!r}")
        return {key: entry.check(f"{name}.{key}", x) for key, x in value.items()}

    return schema.Field(check)


def _numbers(name: str, value) -> torch.Tensor:
    require_tensor(name, value)
    if not value.is_floating_point() or value.device.type != "cpu" or not value.isfinite().all():
        raise ValueError(f"{name}: expected finite floating-point numbers, got {value.dtype} or NaN or infinity")
    return value


def _loss(name: str, value) -> float:
    return math.inf if value == math.inf else require_number(name, value)  # before the first evaluation


def _settings(name: str, value) -> TrainConfig:
    given = _dict_of(str).check(name, value)
    try:
        return TrainConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


TENSORS = _dict_of(str, schema.Field(_numbers))
STATE_ENTRIES = {  # of the file STATE
    "config": schema.Field(_settings),
    "text_hash": schema.text(),
    "step": schema.integer(0, 2**62),
    "best_loss": schema.Field(_loss),
    "model": TENSORS,
    "optimizer": schema.Field(
        lambda name, value: schema.read(
            {"state": _dict_of(int, TENSORS), "param_groups": schema.several(_dict_of(str))},
            _dict_of(str).check(name, value),
            f"{name}.",
        )
    ),
}

# Settings that a resumed run keeps: they make the model, or what its held-out losses are compared by.
KEPT = ("layers", "heads", "width", "context", "dropout", "eval_windows")


class Trainer:
    """Everything a run consists of, between two steps.

    What is random in step i depends on (seed, i) alone, so a resumed run needs no generator states to draw the
    batches and dropout masks that an uninterrupted one draws. A batch is cut into `processes.size * accumulate` parts of
    consecutive windows: each process takes `accumulate` of them, one after the other, and a part's dropout masks depend on
    its place in the batch. So it does not matter who computes a part.

    Args:
        text: a string, or the pathlib.Path of a file in UTF-8. It is tokenized in pieces: see `fastgpt.training.corpus.tokenize`.
        tokenizer, model: to begin with, see `pretrained`; default those of a new character-level model.
        accumulate: parts of a process's share of each batch, whose gradients add up: less memory, the same step.
        processes: see `fastgpt.training.processes.joined`.

    Attributes:
        train_tokens, held_out: the text's tokens, to train on (uint16 or uint32) and held out (int64).
        step: steps done.
        best_loss: the lowest held-out loss so far, nats per token.

    Raises: FileNotFoundError (text), TypeError, ValueError.
    """

    def __init__(
        self, text: str | Path, config: TrainConfig, device="cpu",
        *, tokenizer: Tokenizer | None = None, model: GPT | None = None, accumulate: int = 1,
        processes: Processes = Processes(),
    ):  # fmt: skip
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
        parts = processes.size * require_integer("accumulate", accumulate, 1)
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size: expected a multiple of {parts} (processes: {processes.size}, parts in each: {accumulate}), "
                f"got {config.batch_size}"
            )
        self.config, self.device = config, torch.device(device)
        self.accumulate, self.processes = accumulate, processes
        self.text_hash, characters = summarize(text)
        self.tokenizer = tokenizer or Tokenizer.from_corpus(characters)
        self.train_tokens, held_out = split(tokenize(text, self.tokenizer), config.context)
        self.held_out = held_out.long()
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
        self.step, self.best_loss = 0, math.inf

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth of the peak at `config.steps`.

        It depends on the step and the settings alone, so a run that is resumed with more steps goes on at the rate that a
        run of so many has there: higher than where it ended.
        """
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
            windows = self.train_tokens[starts[first : first + part] + torch.arange(config.context + 1)].long()
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
        ids = generate(model, prompt, num_tokens, temperature=0.8, seed=self.config.seed)
        return self.tokenizer.decode(ids[0].tolist())

    def save(self, folder: Path, *, weights: bool) -> None:
        """Writes the state of the run and, with `weights`, the checkpoint that generates. The first process writes.

        Every file appears whole or not at all, and the state last: whenever a process is ended, what the folder holds can
        be resumed, or has no state yet. The checkpoint's weights may be those of an earlier step.

        Raises: OSError; ValueError while another run has the folder, see `claimed`.
        """
        model, optimizer = self.whole(), self.processes.gathered(self.optimizer.state_dict())
        if not self.processes.first:
            return
        state = {
            "config": asdict(self.config),
            "text_hash": self.text_hash,
            "step": self.step,
            "best_loss": self.best_loss,
            "model": model.state_dict(),
            "optimizer": optimizer,
        }
        handled = sys.exc_info()[1]  # by the caller
        with claimed(folder):
            try:
                if weights:
                    model.save_pretrained(folder)
                elif not (folder / transformers_format.CONFIG).exists():  # the architecture, which a resumed run reads
                    with replacing(folder / transformers_format.CONFIG) as temporary:
                        temporary.write_text(transformers_format.json_text(transformers_format.contents(model)[0]))
                with replacing(folder / TOKENIZER) as temporary:
                    self.tokenizer.save(temporary)
                with replacing(folder / STATE) as temporary, temporary.open("wb") as file:
                    torch.save(state, file)
            except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
                said = error.__context__  # torch.save's own error does not tell what the file's was
                said = said if isinstance(said, OSError) and said is not handled else error
                raise OSError(f"out: {folder} cannot be written to: {reason_of(said)}") from error

    @classmethod
    def resume(
        cls, folder: Path, text: str | Path, device="cpu",
        *, accumulate: int = 1, processes: Processes = Processes(), **changed,
    ) -> "Trainer":  # fmt: skip
        """The trainer that `save` wrote, ready for its next step.

        Args:
            accumulate, processes: may be others than before.
            changed: settings that shall be others from now on, as in TrainConfig: more steps, say, or a smaller learning rate.
                Those that make the model (layers, heads, width, context, dropout), and eval_windows, by which held-out losses
                compare, cannot change.

        Raises: FileNotFoundError; ValueError when the state is damaged or belongs to another text, or a setting cannot change.
        """
        folder = require_path("resume", folder)
        path = folders.find(folder, STATE, "resume")
        if path is None:
            raise FileNotFoundError(f"resume: expected {STATE} of an earlier run in {folder}")
        state = read_state(path)
        config, step = state["config"], state["step"]
        for name, value in changed.items():
            if name in KEPT and value != getattr(config, name):
                raise ValueError(
                    f"{name}: expected {getattr(config, name)}, with which the run in {folder} was started, got {value}"
                )
        config = replace(config, **changed)
        if config.steps < step:
            raise ValueError(f"steps: expected at least {step}, which the run in {folder} has done, got {config.steps}")
        if summarize(text).sha256 != state["text_hash"]:
            raise ValueError(f"text: expected the text that the run in {folder} was started with, got another")
        _, model_config, of_config = transformers_format.read_config(folder)
        model = GPT(GPTConfig(**of_config))
        model.checkpoint_config = model_config
        tokenizer = Tokenizer.from_folder(folder)
        trainer = cls(text, config, device, model=model, tokenizer=tokenizer, accumulate=accumulate, processes=processes)
        try:
            trainer.load(state["model"], state["optimizer"])
        except ValueError as error:
            raise ValueError(f"resume: {path} is damaged: {error}") from None
        trainer.step, trainer.best_loss = step, state["best_loss"]
        return trainer

    def load(self, model: dict, optimizer: dict) -> None:
        """Takes over whole states of model and optimizer, of which this process may have a part. Of the optimizer's these are
        the moments: its settings are those of the run.

        Raises: ValueError that names what does not fit.
        """
        part, own = self.processes.part, self.model.state_dict()
        _require_shapes("model", model, own)
        groups = self.optimizer.state_dict()["param_groups"]
        if [group.get("params") for group in optimizer["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("optimizer.param_groups: expected the parameters of the model, got others")
        parameters = dict(enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"]))
        moments = optimizer["state"]  # none before the first step
        if moments and moments.keys() != parameters.keys():
            raise ValueError(f"optimizer.state: expected an entry for each of {len(parameters)} parameters, got {len(moments)}")
        for i, entry in moments.items():
            like = {"step": torch.empty(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
            _require_shapes(f"optimizer.state.{i}", entry, like)
        self.model.load_state_dict({name: part(value, own[name]) for name, value in model.items()})
        moments = {i: {name: part(value, parameters[i]) for name, value in entry.items()} for i, entry in moments.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _require_shapes(name: str, given: dict, expected: dict) -> None:
    if given.keys() != expected.keys():
        lacking, more = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(f"{name}: expected the entries of this model, got {lacking[:5]} missing and {more[:5]} unexpected")
    for entry, value in given.items():
        if value.shape != expected[entry].shape:
            raise ValueError(f"{name}.{entry}: expected shape {tuple(expected[entry].shape)}, got {tuple(value.shape)}")


def read_state(path: Path) -> dict:
    """What `Trainer.save` wrote of a run, every entry of the type that it has, and its config as a TrainConfig.

    Raises: OSError; ValueError that names the file and what is wrong in it.
    """
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of half a dozen kinds, OSError among them, depending on where the file ends
            raise ValueError(f"resume: {path} is damaged: {type(error).__name__}: {error}".splitlines()[0]) from error
    try:
        return schema.read(STATE_ENTRIES, _dict_of(str).check("state", state))
    except (TypeError, ValueError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model of a run that begins with random weights."""
    if config.width % config.heads:
        raise ValueError(f"width: expected a multiple of the {config.heads} heads, got {config.width}")
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


def require_new_run(folder: Path) -> None:
    """Raises ValueError if a folder holds a run or a model, which a new run would overwrite."""
    if os.path.lexists(folder / STATE):
        raise ValueError(f"out: expected a new folder, {folder} holds a run; continue it with --resume")
    if weights := sorted(
        path.name for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)
    ):
        raise ValueError(f"out: expected a new folder, {folder} holds the model {weights[0]}")


_claimed = ContextVar("claimed", default=frozenset())  # folders, by this thread's runs: a claim may be within another one's


@contextmanager
def claimed(folder: Path, processes: Processes = Processes()) -> Iterator[None]:
    """Within it, a folder, made where there is none, is this run's alone: two would overwrite each other's checkpoints.

    The first process holds an exclusive lock on a file there, which the system releases when the process dies. The file is
    removed at the end, and so are folders that were made and hold nothing. Where the system or the file system has no such
    locks, the folder is only made. All processes enter and leave together.

    Raises: ValueError in all processes where another run has the folder; OSError where it cannot be made or written to.
    """
    path = Path(folder).absolute()
    if path in _claimed.get():
        yield
        return
    lock, error = None, None
    with ExitStack() as made:
        if processes.first:
            try:
                made.enter_context(folders.made(path))
                lock = _lock(path)
            except BlockingIOError as raised:
                error = ValueError(f"out: expected a folder that no other run uses, {folder} is in use by {raised.strerror}")
            except (OSError, ValueError) as raised:  # also of a name that is too long, or that has a null character
                reason = getattr(raised, "strerror", None) or raised
                error = type(raised)(f"out: expected a folder, got {str(folder)!r}: {reason}")
        before = _claimed.set(_claimed.get() | {path})
        try:
            if processes.any(error is not None):
                raise error or ValueError(f"out: expected a folder that the first process can use, got {str(folder)!r}")
            yield
        finally:
            _claimed.reset(before)
            if lock is not None:
                with suppress(OSError):
                    (path / LOCK).unlink()  # before it is free: nobody else's is removed
                lock.close()


def _lock(folder: Path):
    """The folder's lock file, open and locked. Raises BlockingIOError, whose strerror says who has it."""
    for _ in range(10):  # a run that ends may remove file or folder in between
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a+", opener=_opened_here)
        except FileNotFoundError as error:
            missing = error
            continue
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise BlockingIOError(error.errno, file.read().strip() or "another process") from None
        except OSError:  # a file system without locks
            pass
        try:
            current = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
        except FileNotFoundError as error:
            current, missing = False, error
        if current:
            try:
                file.truncate(0)
                print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
                return file
            except OSError:
                (folder / LOCK).unlink()
                with suppress(OSError):  # what could not be written is tried again
                    file.close()
                raise
        file.close()
    raise missing


def _opened_here(path: str, flags: int) -> int:
    """A file that is written to. A link would lead to another one."""
    if os.path.islink(path):
        raise OSError(f"{os.path.basename(path)} in it is a link")
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def train(trainer: Trainer, folder: Path) -> None:
    """Runs what is left of `trainer.config.steps`, in each of the trainer's processes.

    A new run is saved to `folder` at once. At every `eval_interval` steps and at the end it evaluates, shows a sample and
    saves; the weights kept there are those with the lowest held-out loss. Ctrl-C or SIGTERM, to any process, ends the run
    after the current step in the same way; a second one ends it at once.

    Raises: FloatingPointError when the loss or its gradient is not finite any more: the folder keeps the state that was
        saved last, which can be resumed with other settings. OSError when the folder cannot be written to. ValueError while
        another run has the folder, before anything is computed.
    """
    with claimed(folder, trainer.processes):
        _train(trainer, Path(folder))


def _train(trainer: Trainer, folder: Path) -> None:
    config, processes = trainer.config, trainer.processes
    trainer.model.train()
    stop, saved = False, trainer.step
    finite = torch.ones((), dtype=torch.bool, device=trainer.device)

    def require_finite(*more: float) -> None:
        if not (finite and all(map(math.isfinite, more))):
            raise FloatingPointError(
                f"the run has diverged by step {trainer.step}: the loss or its gradient is not finite any more. {folder} holds "
                f"step {saved}: continue it with --resume and a smaller --learning-rate, say."
            )

    if processes.any(trainer.step == 0 or (processes.first and not (folder / STATE).exists())):
        trainer.save(folder, weights=False)
    with (
        processes.interruptible() as interrupted,
        tqdm(total=config.steps, initial=trainer.step, unit="step", disable=not processes.first or sys.stderr is None) as bar,
    ):
        since, counted = time.perf_counter(), trainer.step
        while trainer.step < config.steps and not stop:
            result = torch.stack(trainer.train_step())
            finite &= result.isfinite().all()
            stop = interrupted()
            pause = trainer.step % config.eval_interval == 0 or trainer.step == config.steps or stop
            if pause or trainer.step % CHECK_INTERVAL == 0:
                require_finite()
            if processes.first and (pause or time.perf_counter() - since > SHOW_EVERY):
                loss, norm = result.tolist()  # waits for the device
                tokens = (trainer.step - counted) * config.batch_size * config.context
                speed = tokens / (time.perf_counter() - since)
                bar.set_postfix_str(f"loss {loss:.3f}, gradient norm {norm:.2f}, {speed:,.0f} tokens/s", refresh=False)
                since, counted = time.perf_counter(), trainer.step
            bar.update()
            if pause:
                held_out = trainer.evaluate()
                require_finite(held_out)
                best = held_out < trainer.best_loss
                trainer.best_loss = min(held_out, trainer.best_loss)
                trainer.save(folder, weights=best)
                saved = trainer.step
                text = trainer.sample()
                if processes.first and sys.stdout is not None:
                    bar.write(
                        f"\nstep {trainer.step}: loss {loss:.4f}, held-out loss {held_out:.4f} nats per token"
                        f"{', the lowest so far: saved' if best else f' (lowest {trainer.best_loss:.4f})'}\n"
                        f"{text}\n"
                    )
                since = time.perf_counter()
    if processes.first:
        if stop:
            print(f"Stopped after step {trainer.step} of {config.steps}; continue with --resume.")
        if math.isfinite(trainer.best_loss):
            print(f"{folder}: weights with held-out loss {trainer.best_loss:.4f} nats per token.")
