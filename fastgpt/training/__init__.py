"""The trainer, its data, evaluation and processes."""
