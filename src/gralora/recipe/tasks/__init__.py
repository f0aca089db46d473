"""Tasks that ship with the package: rows to train on, and held-out rows to score."""

from gralora.recipe.tasks.support import support_rows

__all__ = ["support_rows"]
