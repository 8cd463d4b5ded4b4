"""Checkpoints on disk: their folders and formats, loading, saving and conversion."""
