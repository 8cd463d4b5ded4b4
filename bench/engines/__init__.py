"""Whole engines beside their peers: decoding, prefill, serving, the work of the host."""
