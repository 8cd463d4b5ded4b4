"""What reports say: tables, plots, goals, comparisons of two runs."""
