"""A model's configuration: config.json, read and validated."""
