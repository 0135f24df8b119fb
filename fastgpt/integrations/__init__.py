"""Drop-in attention for other people's models."""
