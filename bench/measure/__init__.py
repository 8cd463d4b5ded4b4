"""What a machine takes and can do at most, and the file that a run leaves."""
