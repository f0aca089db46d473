"""Tasks that are part of the package, each with training rows and held-out rows."""

from gralora.recipe.tasks.support import support_rows

__all__ = ["support_rows"]
