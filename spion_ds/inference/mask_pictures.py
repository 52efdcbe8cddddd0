"""Block masks as one picture: a panel a layer and head, with captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spion_ds.switching.mask_files import LayerMask
from spion_ds.training.reports.pictures import colour

# Pixels. A panel has a side of _PANEL or a little less, and with more blocks one pixel each, up to
# _MOST.
_PANEL, _MOST = 144, 512
_WIDTH, _MARGIN, _GAP, _LINE = 1400, 16, 12, 16
_WHITE, _INK = (255, 255, 255), (20, 20, 30)


@dataclass
class _Panel:
    """A mask's picture, (side, side, 3) uint8, and the lines above it."""

    lines: list[str]
    pixels: np.ndarray

    def size(self, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
        """Return width and height in pixels."""
        text = max(int(font.getbbox(line)[2]) for line in self.lines)
        height, width, _ = self.pixels.shape
        return max(width, text), height + _LINE * len(self.lines)


@dataclass
class _Group:
    """Panels that follow each other in rows, below a title ("" for none)."""

    title: str
    panels: list[_Panel]


def draw_masks(layers: Mapping[str, LayerMask]) -> Image.Image:
    """Return the picture of all layers.

    A mask that the heads share is one panel, and such layers stand side by side. A layer with a
    mask a head has a title and rows of its own. Kept blocks are light. A mask of more than 512
    blocks a side is reduced: then lightness is the share that is kept.
    """
    font, groups = _font(), _groups(layers)
    rows = [(g.title if first else "", row) for g in groups for first, row in _rows(g, font)]
    heights = [
        max(panel.size(font)[1] for panel in row) + (_LINE if title else 0) for title, row in rows
    ]
    widths = [
        max(
            sum(panel.size(font)[0] + _GAP for panel in row) - _GAP,
            int(font.getbbox(title)[2]) if title else 0,
        )
        for title, row in rows
    ]
    height = sum(heights) + _GAP * len(rows) + 2 * _MARGIN
    image = Image.new("RGB", (max(widths, default=0) + 2 * _MARGIN, height), _WHITE)
    draw, top = ImageDraw.Draw(image), _MARGIN
    for (title, row), row_height in zip(rows, heights, strict=True):
        left, below = _MARGIN, top
        if title:
            draw.text((left, top), title, fill=_INK, font=font)
            below += _LINE
        for panel in row:
            for number, line in enumerate(panel.lines):
                draw.text((left, below + _LINE * number), line, fill=_INK, font=font)
            place = (left, below + _LINE * len(panel.lines))
            image.paste(Image.fromarray(panel.pixels), place)
            left += panel.size(font)[0] + _GAP
        top += row_height + _GAP
    return image


def _groups(layers: Mapping[str, LayerMask]) -> list[_Group]:
    groups: list[_Group] = []
    for name, layer in layers.items():
        # The font that is always there knows no other letters.
        name, mask = (name or "(model)").encode("ascii", "replace").decode(), layer.mask
        if mask is not None and mask.dim() == 3:
            panels = [
                _Panel([f"head {head}, {_kept(one)}"], _pixels(one))
                for head, one in enumerate(mask)
            ]
            groups.append(_Group(f"{name}: {_sizes(layer)}, {_kept(mask)} kept", panels))
            continue
        if not groups or groups[-1].title:
            groups.append(_Group("", []))
        about = "dense" if mask is None else f"{_sizes(layer)}, {_kept(mask)}"
        pixels = _pixels(torch.ones(1, 1) if mask is None else mask)
        groups[-1].panels.append(_Panel([name, about], pixels))
    return groups


def _rows(
    group: _Group, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Iterator[tuple[bool, list[_Panel]]]:
    """Yield whether it is the first row, and the row's panels."""
    row: list[_Panel] = []
    width, first = 0, True
    for panel in group.panels:
        wanted = panel.size(font)[0] + _GAP
        if row and width + wanted - _GAP > _WIDTH:
            yield first, row
            row, width, first = [], 0, False
        row.append(panel)
        width += wanted
    yield first, row


def _pixels(mask: Tensor) -> np.ndarray:
    values, n = mask.to(torch.float64), mask.shape[-1]
    if n > _MOST:
        values = F.adaptive_avg_pool2d(values[None, None], _MOST)[0, 0]
    factor = max(1, _PANEL // n)
    return colour(values.numpy()).repeat(factor, axis=0).repeat(factor, axis=1)


def _sizes(layer: LayerMask) -> str:
    n = 0 if layer.mask is None else layer.mask.shape[-1]
    return f"{n} x {n} blocks of {layer.block}"


def _kept(mask: Tensor) -> str:
    return f"{float(mask.double().mean()):.1%}"


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(12)
    except (TypeError, OSError, ImportError):  # Pillow 10.0, or one without FreeType
        return ImageFont.load_default()
