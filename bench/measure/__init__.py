"""The timer, the machine's description and ceilings, and the report file of a run."""
