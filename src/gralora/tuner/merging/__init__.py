"""Merging into the base weight of one layer, and the way back to its bits."""
