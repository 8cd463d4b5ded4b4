"""Requests: prompts, settings, sequences as the host sees them, and outputs."""
