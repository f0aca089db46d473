"""What runs inside a model: the mathematics, the layers, the model, and merging into the base weights."""
