"""Execution on the device: the model, its cache, the steps, their CUDA graphs, and sampling."""
