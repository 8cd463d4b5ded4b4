"""The blocks of tools/gpu_visit.py: each is a process with a time limit."""
