"""Adapters and models on disk: reading and writing their files."""
