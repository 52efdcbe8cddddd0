"""The device of these tests, as of the attention tests; and block-sparse tensors made dense."""

from __future__ import annotations

from tests.attention.conftest import _same_draws, device

__all__ = ["_same_draws", "device"]
