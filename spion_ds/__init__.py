"""SPION under DeepSpeed: dense-to-sparse training of Transformers on any number of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spion_ds.legacy import install

if TYPE_CHECKING:
    from spion_ds.switching import DenseToSparse

__all__ = ["DenseToSparse", "install"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not before it is asked for: the build reads the version where PyTorch's users are not yet.
    if name == "DenseToSparse":
        from spion_ds.switching import DenseToSparse

        return DenseToSparse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
