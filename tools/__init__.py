"""One-off helpers, run as `python -P -m gemcut.tools.NAME`."""
