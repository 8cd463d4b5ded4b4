"""Fused ops of Gemma: launchers and, in `reference`, their oracles."""
