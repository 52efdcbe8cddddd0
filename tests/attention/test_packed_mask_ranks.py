"""Two ranks: what carries buffers carries the mask, and every rank computes with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.launching import command, launch

SCRIPT = Path(__file__).parent / "carry_masks.py"


@pytest.mark.ranks
@pytest.mark.parametrize("library", ["ddp", "fsdp", "zero"])
def test_a_mask_reaches_all_ranks(library, tmp_path):
    launch([*command("torchrun", 2), str(SCRIPT), library, str(tmp_path / "saved")], tmp_path)
