"""Encoders with their tokenizers: embeddings of sentences, and words for masked tokens."""
