"""What runs inside a model: the mathematics, the layers, the model, and merging into the base weights."""

# PEFT's import registers these classes, which are imported whole for it: so it comes before any one of them.
import peft  # noqa: F401
