"""`fastgpt train`: starts a run, or resumes one, in one process or in those of torchrun."""

import argparse
import dataclasses
import sys
from typing import Any

import torch

from fastgpt.checkpoints import gguf_file, hub
from fastgpt.cli.arguments import add_device, device_of, integer, number, path, path_or_id
from fastgpt.cli.output import print_stderr
from fastgpt.text.tokenizer_files import copy_companions
from fastgpt.training.config import DTYPES, FIXED_ON_RESUME, WEIGHTS, TrainConfig
from fastgpt.training.loop import train
from fastgpt.training.processes import PARALLEL, joined, local_device
from fastgpt.training.run_folder import claimed, require_new_run
from fastgpt.training.trainer import Trainer, pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --text FILE --out DIR [options]"
    parser.description = "Trains a decoder on a text file, with evaluations, samples and checkpoints on the way."
    add = parser.add_argument
    kept = ", ".join(name.replace("_", "-") for name in FIXED_ON_RESUME[:-1]) + " and " + FIXED_ON_RESUME[-1].replace("_", "-")
    add("--text", type=path, required=True, metavar="FILE", help="training text, in UTF-8; its last 10%% is held out")
    add(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="a new folder for checkpoints; with --resume, the folder of a run",
    )
    add("--resume", action="store_true", help=f"continue the run in DIR with its settings; all but {kept} can be changed")
    add_device(add)
    add("--init-from", type=path_or_id, metavar="PATH_OR_ID", help="fine-tune a checkpoint folder or a GGUF file: start "
        "from its model and tokenizer")  # fmt: skip
    add(
        "--parallel", choices=PARALLEL, help="with torchrun: replicate the model in each process (ddp) or shard it (fsdp) (ddp)"
    )
    add("--accumulate", type=integer, default=1, metavar="N", help="gradient accumulation: compute a process's share of each "
        "batch in N parts, which takes less memory (1)")  # fmt: skip
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        type_: Any
        type_, metavar = {int: (integer, "N"), float: (number, "X"), str: (str, "D")}[field.type]  # type: ignore[index]  # a type
        choices = {"dtype": DTYPES, "weights": WEIGHTS}.get(field.name)
        add(flag, type=type_, choices=choices, metavar=metavar, help=f"{field.metadata['meaning']} ({field.default})")


def run(options: argparse.Namespace) -> None:
    device = device_of(local_device(options.device))
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(options, field.name) is not None
    }
    with joined(options.parallel, device) as processes, claimed(options.out, processes):
        if not options.resume:
            require_new_run(options.out)
            processes.any(False)  # all have looked before one writes
        place = {"device": device, "accumulate": options.accumulate, "processes": processes}
        trainer = resumed(options, settings, place) if options.resume else started(options, settings, place)
        if processes.first:
            print_start(trainer, options, device)
        try:
            train(trainer, options.out)
        except FloatingPointError as error:  # in all processes at once
            if processes.first:
                print_stderr(f"fastgpt: error: {error}")
            sys.exit(1)


def print_start(trainer: Trainer, options: argparse.Namespace, device: torch.device) -> None:
    """Prints the sizes of the model and of the text, and the steps to go."""
    processes = trainer.processes
    parameters = list(trainer.model.parameters())
    trained, frozen = (sum(x.numel() for x in parameters if x.requires_grad == wanted) for wanted in (True, False))
    sizes = f"{trained:,} parameters" + (f" of adapters, beside {frozen:,} that stay as they are" if frozen else "")
    several = f" in each of {processes.size} processes ({processes.parallel})" if processes.parallel else ""
    if options.resume and trainer.step == trainer.config.steps:
        print_stderr(f"fastgpt: the run in {options.out} has done all its {trainer.step:,} steps: --steps MORE continues it")
    print(
        f"{sizes}; {len(trainer.train_tokens):,} tokens to train on, "
        f"{len(trainer.held_out):,} held out; {trainer.config.steps - trainer.step} steps to go on {device}{several}"
    )


def started(options: argparse.Namespace, settings: dict, place: dict) -> Trainer:
    """A new run, from random weights or a checkpoint.

    Args:
        settings: those of TrainConfig that are given.
        place: what else `Trainer` takes: on which devices and in which processes it runs.
    """
    if options.init_from is None:
        if settings.get("lora"):
            raise ValueError("lora: expected --init-from with it, whose model it adapts, got --lora alone")
        return Trainer(options.text, TrainConfig(**settings), **place)
    config, model, tokenizer = pretrained(options.init_from, **settings)
    trainer = Trainer(options.text, config, model=model, tokenizer=tokenizer, base=options.init_from, **place)
    if place["processes"].first and not gguf_file.is_gguf(options.init_from):  # what else belongs to the tokenizer
        options.out.mkdir(parents=True, exist_ok=True)
        copy_companions(hub.resolve(options.init_from), options.out, "init-from")
    return trainer


def resumed(options: argparse.Namespace, settings: dict, place: dict) -> Trainer:
    """The run in the folder --out, as `started` has it."""
    if options.init_from is not None:
        raise ValueError(f"init_from: expected none with --resume, which continues {options.out}, got {options.init_from}")
    return Trainer.resume(options.out, options.text, **place, **settings)
