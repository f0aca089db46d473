"""Answering with a model: prompts, conversations, and held-out rows that are scored."""
