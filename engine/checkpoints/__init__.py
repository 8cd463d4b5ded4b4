"""Weights on disk: where they are, their formats, and the conversion between them."""
