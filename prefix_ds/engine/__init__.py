"""One optimizer step on one or many devices; the only room that knows DeepSpeed."""
