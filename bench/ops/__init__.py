"""Each op beside its peers, at the sizes that models launch it with."""
