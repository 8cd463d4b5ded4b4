"""Reports read back: comparisons of two runs, goals, tables, plots and the Markdown page."""
