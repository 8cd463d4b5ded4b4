"""Tools, run as `python -P -m gemcut.tools.NAME`."""
