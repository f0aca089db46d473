"""Fine-tuning a language model and answering with the result: `gralora train` and `gralora generate`."""
