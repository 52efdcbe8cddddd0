"""Checkpoints: written, found, resumed from."""
