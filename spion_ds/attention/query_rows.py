"""Fewer queries than keys: the block rows of a layout that a call's queries stand in.

Query i of a call stands at position ``query_offset + i``, in the block row of that position. The
GPU kernels want rows of whole blocks: where the first query begins no block, zeros stand before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.observing import captures
from spion_ds.errors import ConfigError

# Crops that a layout keeps for eager calls. Decoding asks for one, a block's tokens long.
_RECENT = 16


def rows_of_queries(
    layout: BlockLayout, queries: int, query_offset: int, *, hold: bool = False
) -> BlockLayout:
    """Return the block rows of ``queries`` queries from position ``query_offset`` on.

    That is the layout itself where they stand in all of its rows. Else it is a layout of those rows
    and all columns, derived on the host at the first call and kept with the layout; its
    ``above_diagonal`` tells of positions, not of its own diagonal.

    Args:
        layout: has these rows.
        queries: at least 1.
        query_offset: at least 0.
        hold: keep it as long as the layout. What torch.compile traces and a CUDA graph captures is
            always kept so; of other crops the latest are kept.

    Raises:
        ConfigError: a CUDA graph is being captured, and it was not derived before.
    """
    first, last = query_offset // layout.block, -(-(query_offset + queries) // layout.block)
    if first == 0 and last == layout.num_rows:
        return layout
    held, recent = ("rows", first, last), ("recent rows", first, last)
    if held in layout.plans:
        return layout.plans[held]
    if hold or torch.compiler.is_compiling():
        _derive(layout, held)
        return layout.plans[held]
    if captures(layout.device):
        if recent not in layout.plans:
            raise ConfigError(
                f"a CUDA graph is being captured with the rows {first} to {last - 1} of a layout, "
                "which were not asked for before; run the step once before, or call prepare_layout "
                "with the same query_offset"
            )
        layout.plans[held] = layout.plans[recent]
        return layout.plans[held]
    if recent not in layout.plans:
        _derive(layout, recent)
    return layout.plans[recent]


@torch.compiler.disable(
    reason="the rows of a layout depend on its values; derive them before, by "
    "prepare_layout(q, k, layout, query_offset=query_offset)"
)
@torch.inference_mode(False)  # a training step may come to read them
def _derive(layout: BlockLayout, name: tuple[str, int, int]) -> None:
    """Put a crop into the layout's plans under ``name``: kind, first row, row behind the last."""
    kind, first, last = name
    mask = layout.mask_of_rows(first, last)
    rows = replace(
        BlockLayout.from_mask(mask, layout.block), above_diagonal=bool(mask.triu(first + 1).any())
    )
    if kind == "recent rows":
        kept = [plan for plan in layout.plans if plan[0] == kind]
        for plan in kept[: len(kept) - _RECENT + 1]:
            del layout.plans[plan]
    layout.plans[name] = rows.to(layout.device)


def in_whole_blocks(q: Tensor, query_offset: int, block: int) -> Tensor:
    """Return q (B, H, L, D) with zeros before and behind it, up to the borders of blocks.

    It is q itself where its first query begins a block.
    """
    before = query_offset % block
    if before == 0:
        return q
    return F.pad(q, (0, 0, before, -(before + q.shape[2]) % block))
