"""Checkpoints: families of models and the formats of their files."""
