"""Which optional packages of the kernels are installed."""

from __future__ import annotations

import importlib.util

# Triton is imported only where it is used.
HAS_TRITON = importlib.util.find_spec("triton") is not None
