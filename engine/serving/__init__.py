"""Serving many requests: the scheduler of slots, the step loop, its thread, queues to callers."""
