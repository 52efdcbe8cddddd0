"""Devices that a test is parametrized with."""

from __future__ import annotations

import pytest
import torch

# The second one is skipped where there is no GPU.
CPU_AND_GPU = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
)
