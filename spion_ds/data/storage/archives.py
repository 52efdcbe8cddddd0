"""Official archives: found in the user's folder or downloaded, and checked by their md5."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import IO, cast

from tqdm import tqdm

from spion_ds.errors import DataError

DOWNLOAD = "download"
# Seconds without a byte after which a server counts as silent.
_PATIENCE = 60


def user_folder(source: str) -> Path:
    """Return the folder that ``data.source`` names, ``~`` included; raise DataError if none is."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise DataError(f"data.source is {source!r}: {error}; name a folder") from error


@contextmanager
def open_tar(path: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Open a .tar.gz: yields name and content of its regular files, in memory, never on disk.

    Raises:
        DataError: it cannot be read, also while what it yielded is read.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            # A link or a folder may have any name.
            members = filter(TarInfo.isfile, tqdm(tar, desc=f"reading {path.name}", unit=" files"))
            yield ((member.name, cast(IO[bytes], tar.extractfile(member))) for member in members)
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises whatever its parser stumbles on
        raise DataError(f"{path} cannot be read ({error}); get it again") from error


@dataclass(frozen=True)
class Archive:
    """A file that others publish.

    Attributes:
        name: the file's name.
        md5: of its content, as its publishers state it.
        address: where it is published.
    """

    name: str
    md5: str
    address: str

    def find(self, source: str, root: Path) -> Path:
        """Return the archive's path; it has been read and is the published one.

        Args:
            source: ``"download"``, or the folder that the file is in.
            root: the folder of all caches; downloads are kept in its ``downloads/``.

        Raises:
            DataError: it is not there, is another file, or cannot be downloaded.
        """
        if source != DOWNLOAD:
            path = self.in_folder(source)
            self._check(path, path)
            return path
        path = Path(root) / "downloads" / self.name
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a regular file; remove it")
        if path.exists():
            self._check(path, path)
        else:
            self._download(path)
        return path

    def in_folder(self, source: str) -> Path:
        """Return the archive's path in the user's folder; raise DataError if it is not there."""
        path = user_folder(source) / self.name
        if not path.is_file():
            raise DataError(
                f"data.source: there is no {path}; get {self.name} from {self.address} and name "
                f"the folder it is in, or set data.source to {DOWNLOAD!r}"
            )
        return path

    def _check(self, path: Path, shown: Path | str) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.md5:
            raise DataError(
                f"{shown} has the md5 {digest.hexdigest()}, the published {self.name} has "
                f"{self.md5}: it is incomplete or another file; delete it and get it from "
                f"{self.address} again"
            )

    def _download(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        try:
            self._fetch(temporary)
            self._check(temporary, f"what {self.address} sent")
            temporary.rename(path)
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
        ) as error:
            raise DataError(
                f"{self.name} cannot be downloaded from {self.address} ({error}); download it "
                "where there is a network, and set data.source to the folder you put it in"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, path: Path) -> None:
        with (
            urllib.request.urlopen(self.address, timeout=_PATIENCE) as answer,
            path.open("wb") as f,
        ):
            total = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm(
                total=total, desc=f"downloading {self.name}", unit="B", unit_scale=True
            ) as bar:
                while block := answer.read(1 << 18):
                    f.write(block)
                    bar.update(len(block))
