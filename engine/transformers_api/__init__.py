"""The classes that the Hugging Face documents of Gemma describe, on gemcut's kernels and cache."""
