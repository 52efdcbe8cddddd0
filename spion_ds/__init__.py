"""SPION under DeepSpeed: dense-to-sparse training of Transformers on any number of GPUs."""

from spion_ds.legacy import install

__all__ = ["install"]
__version__ = "0.1.0"
