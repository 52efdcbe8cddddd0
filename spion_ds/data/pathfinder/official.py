"""The official Pathfinder files: imgs/<batch>/sample_<n>.png and metadata/<batch>.npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from spion_ds.errors import DataError

# The difficulty that the Long Range Arena uses.
_HARD = "curv_contour_length_14"


def official_metadata(source: str, image_size: int) -> list[Path]:
    """Return the metadata files, in the order of their numbers.

    Args:
        source: the folder of ``imgs/`` and ``metadata/``, or one of the folders around it.
        image_size: pixels on a side, which names one of these.

    Raises:
        DataError: there are none.
    """
    folder = Path(source).expanduser()
    size = f"pathfinder{image_size}"
    places = [folder, folder / _HARD, folder / size / _HARD, folder / "lra_release" / size / _HARD]
    for place in places:
        files = [path for path in (place / "metadata").glob("*.npy") if path.stem.isdigit()]
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
                size = image.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{path}, row {number}: {image} is missing; unpack the official files again"
                ) from error
            if size > 0:  # the official set has one empty file
                images.append((image, int(row[3])))
    return images


def read_image(path: Path, image_size: int) -> np.ndarray:
    """Return the (image_size²,) uint8 grey levels of a PNG file, row by row.

    Raises:
        DataError: the file is no image, damaged, or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); unpack it again") from error
    if pixels.shape != (image_size, image_size):
        raise DataError(
            f"{path} has {pixels.shape[1]}×{pixels.shape[0]} pixels; data.image_size is "
            f"{image_size}: name another folder or set data.image_size"
        )
    return pixels.reshape(-1)


def check_official(source: str, image_size: int) -> None:
    """Read the first metadata file and its first image; raise DataError if they are not there."""
    images = official_images(official_metadata(source, image_size)[:1])
    if images:
        read_image(images[0][0], image_size)


def _rows(path: Path) -> list[list[str]]:
    """Return the words of each row: the released files are text, a generator's own real .npy."""
    with path.open("rb") as file:
        is_array = file.read(6) == b"\x93NUMPY"
    try:
        if not is_array:
            return [line.split(" ") for line in path.read_text().splitlines()]
        array = np.load(path, allow_pickle=False)
        return [[_text(word) for word in row] for row in array]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is neither text nor a .npy array of text ({error}); unpack it again"
        ) from error


def _text(word: object) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)
