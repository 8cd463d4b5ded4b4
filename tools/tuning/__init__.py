"""What tools/tune.py tries, in which order, and how it times and keeps the winners."""
