"""Adapters: gemcut under other programs' own commands, by their public extension points."""
