"""SPION under DeepSpeed: dense-to-sparse training of Transformers on any number of GPUs."""

__version__ = "0.1.0"
