"""`gralora train` and `gralora generate`: fine-tuning a language model and using the result."""
