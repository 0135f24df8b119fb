"""The trainer: a decoder on one text file, with held-out evaluation, samples, checkpoints and exact resumption.

It runs in one process or, started by torchrun, in several that share each batch: fastgpt/training/processes.py.
"""

import contextlib
import copy
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from fastgpt import folders
from fastgpt.checkpoints import adapters, gguf_file, transformers_format
from fastgpt.checkpoints.files import CONFIG, STATE, TOKENIZER
from fastgpt.checkpoints.hub import resolve
from fastgpt.checks import require_integer, require_path, write_error
from fastgpt.folders import replacing
from fastgpt.generation.generate import generate
from fastgpt.generation.pipeline import pipeline
from fastgpt.model.config import GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.model.lora import add_adapters
from fastgpt.model.moe import load_balancing_loss, recorded_router_logits
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.config import DTYPES, FIXED_ON_RESUME, TrainConfig, model_config
from fastgpt.training.corpus import summarize, tokenize
from fastgpt.training.evaluation import evaluate, split
from fastgpt.training.processes import Processes, skeleton
from fastgpt.training.run_folder import claimed
from fastgpt.training.state import read_state, require_shapes


class Trainer:
    """A training run: model, optimizer, data and the steps done.

    The random numbers of step i depend on (seed, i) alone, so a resumed run draws the same batches and dropout masks as an
    uninterrupted one, without saved generator states. A batch is split into `processes.size * accumulate` micro-batches: each
    process computes `accumulate` of them, one after the other. A micro-batch's dropout masks depend on its index in the batch,
    not on the process that computes it.

    Args:
        text: a string, or the pathlib.Path of a file in UTF-8. It is tokenized in pieces: see
            `fastgpt.training.corpus.tokenize`.
        tokenizer, model: to start from, see `pretrained`; by default a new character-level model.
        base: where model comes from, which a resumed run with LoRA loads again.
        accumulate: gradient accumulation: micro-batches per process and step, for less memory and the same step.
        processes: see `fastgpt.training.processes.joined`.

    Attributes:
        train_tokens, held_out: the text's tokens, to train on (uint16 or uint32) and held out (int64).
        step: steps done.
        best_loss: the lowest held-out loss so far, nats per token.

    Raises: FileNotFoundError (text), TypeError, ValueError.
    """

    def __init__(
        self, text: str | Path, config: TrainConfig, device: torch.device | str = "cpu",
        *, tokenizer: Tokenizer | None = None, model: GPT | None = None, base: str | Path | None = None,
        accumulate: int = 1, processes: Processes = Processes(),
    ):  # fmt: skip
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
        parts = processes.size * require_integer("accumulate", accumulate, 1)
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size: expected a multiple of {parts} (processes: {processes.size}, parts in each: {accumulate}), "
                f"got {config.batch_size}"
            )
        if config.lora and (model is None or base is None):
            raise ValueError(f"lora: expected 0 without a checkpoint to start from (init_from), got {config.lora}")
        if config.lora and processes.parallel is not None:
            raise ValueError(f"lora: expected 0 in several processes, got {config.lora}")
        self.config, self.device, self.base = config, torch.device(device), _lasting(base)
        self.accumulate, self.processes = accumulate, processes
        self.text_hash, characters = summarize(text)
        self.tokenizer = tokenizer or Tokenizer.from_corpus(characters)
        self.train_tokens, held_out = split(tokenize(text, self.tokenizer), config.context)
        self.held_out = held_out.long()
        torch.manual_seed(config.seed)
        self.model = model or GPT(model_config(config, self.tokenizer.vocab_size))
        if config.balance_loss and self.model.config.num_experts is None:
            raise ValueError(f"balance_loss: expected 0 for a model without experts, got {config.balance_loss}")
        if config.lora:
            add_adapters(self.model, config.lora, config.lora_alpha, config.lora_targets.split(","))
        self.skeleton = skeleton(self.model) if processes.parallel == "fsdp" else None
        self.forward = processes.distribute(self.model, self.device)
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        # Biases of experts are matrices of a row for each.
        matrices = [parameter for name, parameter in trained if parameter.dim() >= 2 and not name.endswith("_bias")]
        others = [parameter for name, parameter in trained if parameter.dim() < 2 or name.endswith("_bias")]
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

        It depends on the step and the settings alone, so a run that is resumed with more steps continues at the rate that a run
        of that many steps has there: higher than where it ended.
        """
        config = self.config
        if step < config.warmup:
            return config.learning_rate * (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    def micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's micro-batches of the current step: inputs and targets, (windows, context) each.

        The windows are at random positions of the text. Before each micro-batch, the generator is seeded for its dropout.
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

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def routed(self) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        """Gives the routers' logits of a forward pass; none if they are not needed."""
        return recorded_router_logits(self.model) if self.config.balance_loss else nullcontext([])

    def _balance(self, router_logits: list[torch.Tensor]) -> torch.Tensor:
        top_k = self.model.config.experts_per_token or 0  # which a model with routers has
        return self.config.balance_loss * load_balancing_loss(router_logits, top_k)

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step.

        Returns: its loss, nats per token, and the norm of its gradient before clipping; both over all processes, scalars
            on the device, which may still be computing them.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, (inputs, targets) in enumerate(self.micro_batches(), 1):
            with nullcontext() if i == self.accumulate else self.processes.accumulating(self.forward):
                with self.autocast(), self.routed() as router_logits:
                    logits = self.forward(inputs)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / self.accumulate
                balance = self._balance(router_logits) / self.accumulate if router_logits else 0.0
                (loss + balance).backward()
            total += loss.detach() / self.processes.size
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.step += 1
        return self.processes.sum(total), norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def evaluate(self) -> float:
        """The held-out loss, see `evaluate`; collective: all processes call it and get the loss."""
        with self.autocast():
            return evaluate(
                self.model, self.held_out, self.config.eval_windows, context=self.config.context, processes=self.processes
            )

    def full_model(self) -> GPT | None:
        """The model; if it is sharded, an unsharded copy on the CPU in the first process, and None in others."""
        if self.processes.parallel != "fsdp":
            return self.model
        weights = self.processes.gathered(self.model.state_dict())
        if not self.processes.first:
            return None
        model: Any = copy.deepcopy(self.skeleton)
        model.load_state_dict(weights, assign=True)
        return model

    def trained_state(self, model: GPT) -> dict[str, torch.Tensor]:
        """The weights that are trained: with LoRA, the adapters."""
        state = model.state_dict()
        if not self.config.lora:
            return state
        return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}

    def sample(self, num_tokens: int = 200) -> str | None:
        """Text sampled from the model, starting with the first held-out token. In the first process; others get None."""
        model = self.full_model()
        if model is None or not self.processes.first:
            return None
        prompt = self.held_out[:1].unsqueeze(0).to(model.first_weight.device)
        num_tokens = min(num_tokens, self.config.context - 1)
        ids = generate(model, prompt, num_tokens, temperature=0.8, seed=self.config.seed)
        return self.tokenizer.decode(ids[0].tolist())

    def save(self, folder: Path, *, weights: bool) -> None:
        """Saves the state of the run and, with `weights`, the model as a checkpoint. The first process writes.

        Files are written atomically, the state last: if the process is killed at any time, the folder can be resumed, or has no
        state yet. The weights in the checkpoint may be those of an earlier step.

        Raises: OSError; ValueError while another run has the folder, see `claimed`.
        """
        model, optimizer = self.full_model(), self.processes.gathered(self.optimizer.state_dict())
        if model is None or not self.processes.first:
            return
        state = {
            "config": asdict(self.config),
            "text_hash": self.text_hash,
            "step": self.step,
            "best_loss": self.best_loss,
            "model": self.trained_state(model),
            "base": self.base,
            "optimizer": optimizer,
        }
        handled = sys.exc_info()[1]  # an exception that the caller is handling
        with claimed(folder):
            try:
                if weights and self.config.lora:
                    adapters.write(model, folder, self.config.lora_alpha, self.base)
                elif weights:
                    model.save_pretrained(folder)
                elif not self.config.lora and not (folder / CONFIG).exists():  # the architecture, which a resumed run reads
                    with replacing(folder / CONFIG) as temporary:
                        temporary.write_text(transformers_format.json_text(transformers_format.contents(model)[0]))
                with replacing(folder / TOKENIZER) as temporary:
                    self.tokenizer.save(temporary)
                with replacing(folder / STATE) as temporary, temporary.open("wb") as file:
                    torch.save(state, file)
            except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
                said = error.__context__  # torch.save's own error hides that of the file
                said = said if isinstance(said, OSError) and said is not handled else error
                raise write_error("out", folder, f"{folder} cannot be written to", said) from error

    @classmethod
    def resume(
        cls, folder: Path, text: str | Path, device: torch.device | str = "cpu",
        *, accumulate: int = 1, processes: Processes = Processes(), **changed,
    ) -> "Trainer":  # fmt: skip
        """A trainer with the state that `save` wrote, ready for its next step.

        Args:
            accumulate, processes: may differ from before.
            changed: settings of TrainConfig to change from now on, for example more steps or a smaller learning rate. Those that
                define the model (layers, heads, width, context, dropout), and eval_windows, which keeps held-out losses
                comparable, cannot change.

        Raises: FileNotFoundError; ValueError when the state is damaged or belongs to another text, or a setting cannot change.
        """
        folder = require_path("resume", folder)
        path = folders.find(folder, STATE, "resume")
        if path is None:
            raise FileNotFoundError(f"resume: expected {STATE} of an earlier run in {folder}")
        state = read_state(path)
        config, step = state["config"], state["step"]
        for name, value in changed.items():
            if name in FIXED_ON_RESUME and value != getattr(config, name):
                raise ValueError(
                    f"{name}: expected {getattr(config, name)}, with which the run in {folder} was started, got {value}"
                )
        config = replace(config, **changed)
        if config.steps < step:
            raise ValueError(f"steps: expected at least {step}, which the run in {folder} has done, got {config.steps}")
        if summarize(text).sha256 != state["text_hash"]:
            raise ValueError(f"text: expected the text that the run in {folder} was started with, got another")
        if config.lora:
            if state["base"] is None:
                raise ValueError(f"resume: {path} is damaged: base: expected the checkpoint that adapters belong to, got None")
            _, model, _ = pretrained(state["base"], **asdict(config))
        else:
            _, model_config, of_config = transformers_format.read_config(folder, loader="GPT")
            model = GPT(GPTConfig(**of_config))
            model.checkpoint_config = model_config
        given = {"model": model, "tokenizer": Tokenizer.from_folder(folder), "base": state["base"]}
        trainer = cls(text, config, device, **given, accumulate=accumulate, processes=processes)
        try:
            trainer.load(state["model"], state["optimizer"])
        except ValueError as error:
            raise ValueError(f"resume: {path} is damaged: {error}") from None
        trainer.step, trainer.best_loss = step, state["best_loss"]
        return trainer

    def load(self, model: dict, optimizer: dict) -> None:
        """Loads unsharded states of model and optimizer; with FSDP this process keeps its shards. Of the optimizer's state only
        the moments are used: its settings are those of the run.

        Raises: ValueError that names what does not fit.
        """
        part, own = self.processes.part, self.trained_state(self.model)
        require_shapes("model", model, own)
        groups = self.optimizer.state_dict()["param_groups"]
        if [group.get("params") for group in optimizer["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("optimizer.param_groups: expected the parameters of the model, got others")
        parameters = dict(enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"]))
        moments = optimizer["state"]  # none before the first step
        if moments and moments.keys() != parameters.keys():
            raise ValueError(f"optimizer.state: expected an entry for each of {len(parameters)} parameters, got {len(moments)}")
        for i, entry in moments.items():
            like = {"step": torch.empty(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
            require_shapes(f"optimizer.state.{i}", entry, like)
        self.model.load_state_dict({name: part(value, own[name]) for name, value in model.items()}, strict=not self.config.lora)
        moments = {i: {name: part(value, parameters[i]) for name, value in entry.items()} for i, entry in moments.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _lasting(base: str | Path | None) -> str | None:
    """A path that is valid in another working directory, or the id of a model."""
    return None if base is None else os.path.abspath(base) if os.path.exists(base) else str(base)


def pretrained(path: str | Path, **given) -> tuple[TrainConfig, GPT, Tokenizer]:
    """What a `Trainer` needs to fine-tune a checkpoint: of a folder, of a GGUF file, or of the Hub by its id.

    Args:
        given: settings, as in TrainConfig. The architecture, dropout included, is the checkpoint's; only the context may be
            another, a shorter one.

    Raises: FileNotFoundError, or ValueError when a setting or the tokenizer does not fit the checkpoint's model.
    """
    source = path if gguf_file.is_gguf(path) else resolve(path, argument="init_from")
    weights: str | None = given.get("weights", "stored")
    if weights == "stored":
        weights = None if given.get("lora") else "dequantized"
    if source is path:
        pipe = pipeline(source, dtype=torch.float32, device="cpu", weights=weights)
        tokenizer, model = pipe.tokenizer, pipe.model
    else:
        tokenizer, model = Tokenizer.from_folder(source), GPT.from_pretrained(source, dtype=torch.float32, weights=weights)
    architecture = model.config
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"init_from: expected a {TOKENIZER} of at most {architecture.vocab_size} tokens, those of the model in {source}, "
            f"got {tokenizer.vocab_size}"
        )
    fixed = {
        "layers": architecture.num_layers, "heads": architecture.num_heads,
        "width": architecture.hidden_size, "dropout": architecture.dropout,
    }  # fmt: skip
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, that of the model in {source}, got {given[name]}")
    longest = architecture.context_length
    given.setdefault("context", min(TrainConfig.context, longest))
    if given["context"] > longest:
        raise ValueError(f"context: expected at most {longest}, that of the model in {source}, got {given['context']}")
    return TrainConfig(**(given | fixed)), model, tokenizer
