"""The training loop over DeepSpeed's engine; the only room that knows ranks."""
