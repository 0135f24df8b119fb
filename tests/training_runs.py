"""A small training run."""

from fastgpt.training.config import TrainConfig

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40

TINY = TrainConfig(layers=1, heads=2, width=32, context=16, batch_size=8, steps=60, warmup=5, eval_interval=20)


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
