"""The documented tokenizers: vocabularies, special tokens, chat templates, padded batches."""
