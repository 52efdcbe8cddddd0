"""python -m spion_ds.masks: show, png, diff and export the masks of a place."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, SpionError
from spion_ds.inference.mask_pictures import draw_masks
from spion_ds.inference.mask_places import read_place
from spion_ds.switching.mask_files import LayerMask, layers_digest, write_atomically, write_masks

SAME, DIFFERENT, ERROR = 0, 1, 2
_PLACE = (
    "a run's folder (its best checkpoint, else the latest), a checkpoint's, an exported model's, "
    "or a masks file"
)
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Difference:
    """Two masks of one layer, compared over all heads.

    Attributes:
        both, only_a, only_b: kept blocks; None where the masks cannot be compared.
        note: why they cannot be compared, or "".
    """

    both: int | None = None
    only_a: int | None = None
    only_b: int | None = None
    note: str = ""

    @property
    def same(self) -> bool:
        """Whether both keep the same blocks."""
        return not self.note and not self.only_a and not self.only_b

    @property
    def jaccard(self) -> float:
        """Blocks that both keep, of those that either keeps; 1 where neither keeps any."""
        both, either = self.both or 0, (self.both or 0) + (self.only_a or 0) + (self.only_b or 0)
        return both / either if either else 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code.

    0 done (diff: the same), 1 diff found a difference, 2 an error, which is one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SpionError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    return ERROR


def masks_table(layers: Mapping[str, LayerMask]) -> str:
    """Return a line a layer: its shape, how much it keeps, and the range over its heads."""
    rows = [("layer", "heads", "block", "n", "kept", "density", "diagonal", "density of heads")]
    for name, layer in layers.items():
        mask, sizes = layer.mask, (name or "(model)", str(layer.heads), str(layer.block))
        if mask is None:
            rows.append((*sizes, "-", "all", "100.0%", "100.0%", "dense"))
            continue
        heads = mask.double().mean(dim=(-2, -1))
        spread = "one mask for all"
        if mask.dim() == 3:
            spread = f"{float(heads.min()):.1%} to {float(heads.max()):.1%}"
        rows.append(
            (
                *sizes,
                str(mask.shape[-1]),
                f"{int(mask.sum()):,} of {mask.numel():,}",
                f"{float(heads.mean()):.1%}",
                f"{float(mask.diagonal(dim1=-2, dim2=-1).double().mean()):.1%}",
                spread,
            )
        )
    return _aligned(rows)


def compare_layers(a: LayerMask, b: LayerMask) -> Difference:
    """Compare two masks of one layer; a dense one keeps all, a shared one the same in each head."""
    for what, ours, theirs in (
        ("block", a.block, b.block),
        ("heads", a.heads, b.heads),
        ("n", _side(a) or _side(b), _side(b) or _side(a)),
    ):
        if ours != theirs:
            return Difference(note=f"{what} is {ours} in A and {theirs} in B")
    side = _side(a) or _side(b)
    if side is None:
        return Difference(0, 0, 0)
    first, second = _each_head(a, side), _each_head(b, side)
    if not (_has_own(a) or _has_own(b)):
        first, second = first[0], second[0]
    both = int((first & second).sum())
    return Difference(both, int(first.sum()) - both, int(second.sum()) - both)


def _show(options: argparse.Namespace) -> int:
    layers = read_place(options.place)
    print(masks_table(layers))
    print(f"digest {layers_digest(layers)}")
    return SAME


def _png(options: argparse.Namespace) -> int:
    file: Path = options.file
    if file.exists() and not _is_png(file):
        raise ConfigError(f"{file} exists and is no PNG picture; give another name, or remove it")
    content = io.BytesIO()
    draw_masks(read_place(options.place)).save(content, format="PNG")
    write_atomically(file, content.getvalue())
    print(f"wrote {file}")
    return SAME


def _diff(options: argparse.Namespace) -> int:
    a, b = read_place(options.a), read_place(options.b)
    rows: list[tuple[str, ...]] = [("layer", "in both", "only in A", "only in B", "Jaccard")]
    different = 0
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            found = Difference(note=f"the layer is only in {'A' if name in a else 'B'}")
        else:
            found = compare_layers(a[name], b[name])
        different += not found.same
        if found.note:
            rows.append((name, found.note))
        elif a[name].mask is None and b[name].mask is None:
            rows.append((name, "dense", "0", "0", "1.000"))
        else:
            counts = (found.both, found.only_a, found.only_b)
            rows.append((name, *(f"{count:,}" for count in counts), f"{found.jaccard:.3f}"))
    print(f"A  {options.a}\nB  {options.b}\n{_aligned(rows)}")
    layers = len(rows) - 1
    print(f"different in {different} of {layers} layers" if different else "the same blocks")
    return DIFFERENT if different else SAME


def _export(options: argparse.Namespace) -> int:
    digest = write_masks(read_place(options.place), options.file)
    print(f"wrote {options.file}, digest {digest}")
    return SAME


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spion_ds.masks",
        description="Look at the block masks of a model, compare them, or take them out.",
        epilog="Errors are one line on stderr, and exit code 2.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, short: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{short[0].upper()}{short[1:]}.{more}"
        one = commands.add_parser(name, help=short, description=description)
        one.set_defaults(run=run)
        return one

    show = command(
        "show",
        _show,
        "print a table of what each layer keeps, and the digest of all masks",
        " n is blocks a side; kept and density count the blocks of all masks of the layer; "
        "diagonal is the share of the diagonal's blocks that are kept.",
    )
    png = command("png", _png, "draw the masks: a panel a layer and head, kept blocks light")
    export = command("export", _export, "write a masks file, which spion_ds.masks.load_masks reads")
    for one in (show, png, export):
        one.add_argument("place", type=Path, metavar="PLACE", help=_PLACE)
    png.add_argument("file", type=Path, metavar="FILE", help="the picture; a PNG is replaced")
    export.add_argument("file", type=Path, metavar="FILE", help="a masks file there is replaced")
    diff = command(
        "diff",
        _diff,
        "compare two places layer by layer",
        " Exit code 0: both keep the same blocks; 1: they do not; 2: an error. A dense layer keeps "
        "all blocks; a mask that the heads share counts for each head.",
    )
    for name in ("a", "b"):
        diff.add_argument(name, type=Path, metavar=name.upper(), help=_PLACE)
    return parser


def _side(layer: LayerMask) -> int | None:
    return None if layer.mask is None else layer.mask.shape[-1]


def _has_own(layer: LayerMask) -> bool:
    return layer.mask is not None and layer.mask.dim() == 3


def _each_head(layer: LayerMask, side: int) -> Tensor:
    """Return the mask of each head, (heads, n, n)."""
    mask = torch.ones((side, side), dtype=torch.bool) if layer.mask is None else layer.mask
    return mask.expand(layer.heads, side, side)


def _is_png(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text: names to the left, the rest to the right; (name, note) as it is."""
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for name, *rest in rows:
        cells = rest if len(rest) < 2 else map(str.rjust, rest, widths[1:])
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)
