"""Each op beside its peers, at the shapes that models launch it with."""
