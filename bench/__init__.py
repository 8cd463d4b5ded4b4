"""Measurements: `gemcut-bench`."""
