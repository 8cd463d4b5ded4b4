"""What runs on the device: the model, its cache, a step, its CUDA graphs, the choice of tokens."""
