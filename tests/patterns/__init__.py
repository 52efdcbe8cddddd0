"""Tests of spion_ds.patterns."""
