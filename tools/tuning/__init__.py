"""Search space, ranking, trials and tile file of tools/tune.py."""
