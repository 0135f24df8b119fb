"""Training: the trainer, its data, evaluation and processes."""
