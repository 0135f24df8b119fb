"""The decoder, its configuration, and what stands on it."""
