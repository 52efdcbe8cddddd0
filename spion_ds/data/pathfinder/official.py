"""The official Pathfinder files: imgs/<batch>/sample_<n>.png and metadata/<batch>.npy."""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from spion_ds.data.storage.archives import user_folder
from spion_ds.errors import DataError

# The difficulty that the Long Range Arena uses.
_HARD = "curv_contour_length_14"
# Of Pillow, for images of up to 8 bits a channel.
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def official_metadata(source: str, image_size: int) -> list[Path]:
    """Return the metadata files, in the order of their numbers.

    Args:
        source: the folder of ``imgs/`` and ``metadata/``, or one of the folders around it.
        image_size: pixels on a side, which names one of these.

    Raises:
        DataError: there are none.
    """
    folder = user_folder(source)
    size = f"pathfinder{image_size}"
    places = [folder, folder / _HARD, folder / size / _HARD, folder / "lra_release" / size / _HARD]
    for place in places:
        files = [path for path in (place / "metadata").glob("*.npy") if path.stem.isdecimal()]
        if files:
            return sorted(files, key=lambda path: int(path.stem))
    raise DataError(
        f"data.source: {folder} has no metadata/<number>.npy, nor {size}/{_HARD}/metadata, nor "
        f"lra-{size}-{_HARD}.train.pickle; name the folder with imgs/ and metadata/, or set "
        "data.source to 'generate', which needs no files"
    )


def official_images(metadata: list[Path]) -> list[tuple[Path, int]]:
    """Return path and label of every image that the metadata files name and that is not empty.

    Raises:
        DataError: a metadata file is of another format, or an image is missing.
    """
    images = []
    for path in metadata:
        folder = path.parent.parent
        for number, row in enumerate(_rows(path), start=1):
            # Columns: folder, file, number, label, parameters of the generator.
            if len(row) < 4 or row[3] not in ("0", "1"):
                raise DataError(
                    f"{path}, row {number}: expected folder, file, number and label 0 or 1, found "
                    f"{' '.join(row[:4])!r}; unpack the official files again"
                )
            image = folder / row[0] / row[1]
            try:
                info = image.stat()
            except (OSError, ValueError) as error:  # ValueError: a name with a null character
                raise DataError(
                    f"{path}, row {number}: {image} is missing; unpack the official files again"
                ) from error
            if not stat.S_ISREG(info.st_mode):
                raise DataError(
                    f"{path}, row {number}: {image} is not a regular file; unpack the official "
                    "files again"
                )
            if info.st_size > 0:  # the official set has one empty file
                images.append((image, int(row[3])))
    return images


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Return the (image_size²,) uint8 grey levels of a PNG file, row by row.

    Raises:
        DataError: the file is no PNG image, damaged, of another size or of 16 bits.
    """
    try:
        with path.open("rb") as file:
            size, bits = _png_header(file)
            if size != (image_size, image_size):  # before any pixel is decoded
                raise DataError(
                    f"{path} has {size[0]}×{size[1]} pixels; data.image_size is {image_size}: name "
                    "another folder or set data.image_size"
                )
            if bits > 8:
                raise DataError(
                    f"{path} has {bits} bits a channel; allowed: up to 8; convert the images"
                )
            # Pillow would try all formats that it knows, and start Ghostscript for some.
            with Image.open(file, formats=("PNG",)) as image:
                if image.size != size or image.mode not in _MODES:
                    raise ValueError("it has several headers")
                return np.asarray(image.convert("L")).reshape(-1)
    except DataError:
        raise
    except Exception as error:  # a damaged image raises whatever its decoder stumbles on
        raise DataError(
            f"{path} cannot be read as a PNG image ({error}); unpack it again"
        ) from error


def _png_header(file: BinaryIO) -> tuple[tuple[int, int], int]:
    """Return width and height in pixels and the bits of a channel; leaves the file at its start."""
    header = file.read(25)
    file.seek(0)
    if len(header) < 25 or header[:8] != b"\x89PNG\r\n\x1a\n" or header[12:16] != b"IHDR":
        raise ValueError("it does not begin as one")
    width, height, bits = struct.unpack(">IIB", header[16:])
    return (width, height), bits


def check_official(source: str, image_size: int) -> None:
    """Read the first metadata file and its first image; raise DataError if they are not there."""
    images = official_images(official_metadata(source, image_size)[:1])
    if images:
        read_image(images[0][0], image_size)


def _rows(path: Path) -> list[list[str]]:
    """Return the words of each row: the released files are text, a generator's own real .npy."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            is_array = file.read(6) == b"\x93NUMPY"
        if not is_array:
            return [line.split(" ") for line in path.read_text("utf-8").splitlines()]
        # As a map, so that no memory is taken for what the file's header says and it does not have.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind not in "SU" or array.nbytes == 0:
            raise ValueError(f"an array of {array.dtype} and shape {array.shape}")
        return [[_text(word) for word in row] for row in array]
    except Exception as error:  # a damaged header raises whatever its parser stumbles on
        raise DataError(
            f"{path} is neither text nor a .npy array of text ({error}); unpack it again"
        ) from error


def _text(word: object) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)
