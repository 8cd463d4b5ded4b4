"""The documented models: configs, forward passes, `generate`, caches and outputs."""
