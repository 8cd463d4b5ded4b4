"""How requests share one engine: slots, the step loop and its thread, and what callers wait on."""
