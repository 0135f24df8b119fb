"""The training loop: optimizer steps, with evaluations, samples and checkpoints in between."""

import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fastgpt.checkpoints.files import STATE
from fastgpt.training.run_folder import claimed
from fastgpt.training.trainer import Trainer

LOG_INTERVAL = 0.5  # seconds between updates of the progress bar, each of which waits for the device
CHECK_INTERVAL = 20  # steps between checks for divergence, which are collective: all processes make them together


def train(trainer: Trainer, folder: Path) -> None:
    """Runs the remaining steps of `trainer.config.steps`, in each of the trainer's processes.

    A new run is saved to `folder` at once. Every `eval_interval` steps and at the end it evaluates, prints a sample and saves;
    the weights that are kept are those with the lowest held-out loss. Ctrl-C or SIGTERM, to any process, stops the run after
    the current step in the same way; a second one stops it at once.

    Raises: FloatingPointError if the loss or its gradient becomes infinite or NaN: the folder keeps the state that was saved
        last, which can be resumed with other settings. OSError if the folder cannot be written to. ValueError if another run
        uses the folder, before anything is computed.
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
                f"the run has diverged by step {trainer.step}: the loss or its gradient is infinite or NaN. {folder} holds "
                f"step {saved}: continue with --resume, for example with a smaller --learning-rate."
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
            if processes.first and (pause or time.perf_counter() - since > LOG_INTERVAL):
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
            print(
                f"{folder}: {'adapter' if config.lora else 'weights'} with held-out loss {trainer.best_loss:.4f} nats per token."
            )
