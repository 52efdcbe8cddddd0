"""The layouts of DeepSpeed 0.19.6, from its source distribution on the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

VERSION = "0.19.6"
SHA256 = "31593acffbe4794c74446094122b1bc29d8c73a137e37aff899ca4a6480df2d8"
MEMBER = f"deepspeed-{VERSION}/deepspeed/ops/sparse_attention/sparsity_config.py"


@pytest.fixture(scope="session")
def deepspeeds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ModuleType:
    """DeepSpeed's sparsity_config.py alone: DeepSpeed itself is not imported."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("deepspeed-source") if cache else tmp_path_factory.mktemp("deepspeed")
    archive = folder / f"deepspeed-{VERSION}.tar.gz"
    if not archive.is_file():
        _download(archive, tmp_path_factory.mktemp("download"))
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    source = tmp_path_factory.mktemp("source") / "deepspeed_sparsity_config.py"
    with tarfile.open(archive) as files:
        member = files.extractfile(MEMBER)
        assert member is not None
        source.write_bytes(member.read())
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _download(archive: Path, folder: Path) -> None:
    words = [sys.executable, "-m", "pip", "download", f"deepspeed=={VERSION}", "-d", str(folder)]
    words += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--retries", "1"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"the package index does not give DeepSpeed {VERSION}'s source: {last}")
    # Several test processes may fetch it at once.
    os.replace(folder / archive.name, archive)
