"""What tests/training/test_distributed.py runs in two processes, started by torchrun: short runs of the trainer, alone and together.

The first process writes what came out to results.json in the folder that is given.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from fastgpt.training.config import TrainConfig
from fastgpt.training.evaluation import evaluate
from fastgpt.training.processes import Processes, joined
from fastgpt.training.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
CONFIG = TrainConfig(
    layers=2, heads=2, width=32, context=16, batch_size=8, steps=8, warmup=3, dropout=0.0, eval_windows=7
)  # fmt: skip
SAVED = 3  # steps until a run is saved
DROPOUT = 0.2  # of the runs that have any


def curve(trainer: Trainer, steps: int = CONFIG.steps) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    trainer.model.train()
    return [[value.item() for value in trainer.train_step()] for _ in range(steps)]


def in_float64(trainer: Trainer) -> Trainer:
    trainer.model.double()
    return trainer


def local_share(tensors) -> float:
    """How much of their memory this process holds."""
    tensors = list(tensors)
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum(x.untyped_storage().nbytes() for x in local) / sum(x.numel() * x.element_size() for x in tensors)


def results(folder: Path, together: Processes) -> dict:
    alone = Trainer(TEXT, CONFIG)
    seen = {"one": {"held-out loss at first": alone.evaluate()}}
    dropout = dataclasses.replace(CONFIG, dropout=DROPOUT)
    curves = {
        "one": curve(alone),
        "one in two parts": curve(Trainer(TEXT, CONFIG, accumulate=2)),
        "one in two parts, dropout": curve(Trainer(TEXT, dropout, accumulate=2)),
    }
    seen["one"]["sample"] = alone.sample(12)

    half = Trainer(TEXT, CONFIG, accumulate=2)
    curve(half, SAVED)
    if together.first:
        half.save(folder / "one", weights=True)
    together.any(False)  # wait for it

    for parallel in ("ddp", "fsdp"):
        options = {"processes": dataclasses.replace(together, parallel=parallel)}
        trainer = Trainer(TEXT, CONFIG, **options)
        curves[parallel] = curve(trainer, SAVED)
        trainer.save(folder / parallel, weights=True)
        curves[parallel] += curve(trainer, CONFIG.steps - SAVED)
        whole = trainer.full_model()
        seen[parallel] = {
            "held-out loss": trainer.evaluate(),
            "held-out loss alone": whole and evaluate(whole, trainer.held_out, CONFIG.eval_windows),
            "sample": trainer.sample(12),
            "share of weights": local_share(trainer.model.parameters()),
        }
        curves[f"{parallel} in two parts"] = curve(Trainer(TEXT, CONFIG, accumulate=2, **options))
        curves[f"{parallel}, dropout"] = curve(Trainer(TEXT, dropout, **options))
        for earlier in ("one", parallel):
            resumed = Trainer.resume(folder / earlier, TEXT, **options)
            moments = [state[name] for state in resumed.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            seen[parallel][f"share of moments from {earlier}"] = local_share(moments)
            curves[f"{earlier}, then {parallel}"] = curve(resumed, CONFIG.steps - SAVED)
    together.any(False)
    for parallel in ("ddp", "fsdp"):
        resumed = Trainer.resume(folder / parallel, TEXT, accumulate=2)
        curves[f"{parallel}, then one"] = curve(resumed, CONFIG.steps - SAVED)
    return {"curves": curves, "seen": seen}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with joined(None, torch.device("cpu")) as together:
        found = results(folder, together)
        if together.first:
            (folder / "results.json").write_text(json.dumps(found))
