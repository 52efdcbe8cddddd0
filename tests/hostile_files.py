"""Hostile files: every reader meets damaged, swapped, nonsensical and malicious files.

A reader must refuse a file in one sentence (a SpionError), or read the same as before. Where a
format has no sum, and in files of the user's own, it may read something else. It must never end in
another error, hang, or run what is in a file.

    python -m tests.hostile_files --cases 40 --seed 0

makes 40 random damages for each file of each reader, beside those that are always made. The last
line counts what was tried, refused, read and wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spion_ds.errors import SpionError

# A reader of files of some kilobytes takes milliseconds; above this it waits for something.
LIMIT_SECONDS = 30


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        name: in what is printed.
        make: ``(folder)`` writes good files into an empty folder and returns those to damage.
        read: ``(folder)`` reads them; what it returns is compared.
        summed: whether any change of a byte must be refused.
        seal: ``(folder)`` makes the sums of files right again, so that what is in them is read.
    """

    name: str
    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    summed: bool = False
    seal: Callable[[Path], None] | None = None


class Executes:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@dataclass(frozen=True)
class Damage:
    """A way to damage a file; ``apply(path, mark)`` does it, code in a pickle makes ``mark``."""

    name: str
    apply: Callable[[Path, Path], None]


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def apply(path: Path, mark: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return apply


def _replace(make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def apply(path: Path, mark: Path) -> None:
        path.unlink()
        make(path)

    return apply


def _torch_pickle(path: Path, mark: Path) -> None:
    torch.save({"format": 2, "x": Executes(mark)}, path)


def _plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps([Executes(mark)], protocol=2))


DEEP = 100_000
ALWAYS = [
    Damage("empty", _rewrite(lambda _: b"")),
    Damage("half", _rewrite(lambda content: content[: len(content) // 2])),
    Damage("last byte missing", _rewrite(lambda content: content[:-1])),
    Damage("doubled", _rewrite(lambda content: content * 2)),
    Damage("zeros", _rewrite(lambda content: bytes(len(content)))),
    Damage("random bytes", _rewrite(lambda content: random.Random(1).randbytes(len(content)))),
    Damage("deep JSON", _rewrite(lambda _: b'{"x":' + b"[" * DEEP + b"]" * DEEP + b"}")),
    Damage("deep YAML", _rewrite(lambda _: b"x: " + b"[" * 5000 + b"]" * 5000)),
    Damage("deep pickle", _rewrite(lambda _: b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".")),
    Damage("JSON of another kind", _rewrite(lambda _: b'["a", 1, null]\n')),
    Damage("UTF-16", _rewrite(lambda _: "task: listops\n".encode("utf-16"))),
    Damage("a pickle that calls", _plain_pickle),
    Damage("a checkpoint that calls", _torch_pickle),
    Damage("an object array", _rewrite(lambda _: pickle.dumps({"a": {1, 2}, "b": 1 + 2j}))),
    Damage("a folder", _replace(Path.mkdir)),
    Damage("a pipe", _replace(os.mkfifo)),
    Damage("a device without end", _replace(lambda path: path.symlink_to("/dev/zero"))),
    Damage("a link to itself", _replace(lambda path: path.symlink_to(path.name))),
    Damage("missing", _replace(lambda path: None)),
]
NONSENSE: list[Any] = [None, True, -1, 1 << 70, 1e308, "x", "", [], {}, [[]], {"a": {"b": []}}]


def flip(generator: random.Random) -> Damage:
    """Return a damage that changes one bit."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        place = generator.randrange(len(content))
        changed[place] ^= 1 << generator.randrange(8)
        return bytes(changed)

    return Damage("one bit", _rewrite(change))


def cut(generator: random.Random) -> Damage:
    """Return a damage that ends the file early."""
    return Damage("cut off", _rewrite(lambda content: content[: generator.randrange(len(content))]))


def scramble(generator: random.Random) -> Damage:
    """Return a damage that copies one piece of the file over another."""

    def change(content: bytes) -> bytes:
        size = generator.randrange(1, max(2, len(content) // 4))
        start, there = (generator.randrange(len(content)) for _ in range(2))
        piece = content[start : start + size]
        return content[:there] + piece + content[there + len(piece) :]

    return Damage("a piece over another", _rewrite(change))


def nonsense(generator: random.Random) -> Damage:
    """Return a damage that puts a value of another type or size into JSON; into others, bytes."""

    def change(content: bytes) -> bytes:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return content[::-1]
        places = list(_places(values))
        holder, key = generator.choice(places) if places else ({}, "x")
        if generator.random() < 0.25:
            del holder[key]
        else:
            holder[key] = generator.choice(NONSENSE)
        return json.dumps(values).encode()

    return Damage("nonsense", _rewrite(change))


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of JSON values."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield values, key
        if isinstance(value, dict | list):
            yield from _places(value)


def swapped(other: Path) -> Damage:
    """Return a damage that puts the content of another file there."""
    content = other.read_bytes()
    return Damage(f"the content of {other.name}", _rewrite(lambda _: content))


RANDOM = (flip, flip, cut, scramble, nonsense)


class Hangs(BaseException):
    """A reader waits for something that will not come; no Exception, which a reader may catch."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hangs in the main thread after some seconds."""

    def stop(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """Outcomes, counted; the wrong ones with what shows them."""

    counts: Counter[str]
    wrong: list[str]

    def line(self) -> str:
        """Return the last line of a run."""
        counts = {name: self.counts[name] for name in ("refused", "read", "wrong")}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        return f"tried {sum(counts.values())}, {shown}"


def attack(reader: Reader, cases: int, seed: int, tally: Tally, *, sealed: bool = False) -> None:
    """Let a reader meet every damage that is always made, and ``cases`` random ones, a file.

    Args:
        reader: who reads.
        cases: random damages of each file.
        seed: they follow from it and the reader's name.
        tally: receives the outcomes.
        sealed: whether sums are made right again after the damage.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        good, bad, mark = Path(root) / "good", Path(root) / "bad", Path(root) / "mark"
        good.mkdir()
        files = [path.relative_to(good) for path in reader.make(good)]
        shutil.copytree(good, bad, symlinks=True)
        wanted = reader.read(bad)
        generator = random.Random(f"{seed} {reader.name}")
        for file in files:
            made = [RANDOM[n % len(RANDOM)](generator) for n in range(cases)]
            others = [swapped(good / other) for other in files if other != file]
            for damage in [*ALWAYS, *others, *made]:
                shutil.rmtree(bad)
                shutil.copytree(good, bad, symlinks=True)
                before = (bad / file).read_bytes()
                damage.apply(bad / file, mark)
                if sealed and reader.seal is not None:
                    if not _is_plain(bad / file):
                        continue
                    reader.seal(bad)
                elif _is_plain(bad / file) and (bad / file).read_bytes() == before:
                    continue
                outcome, said = _meet(reader, bad, wanted, mark, sealed)
                tally.counts[outcome] += 1
                if outcome == "wrong":
                    how = "sealed, " if sealed else ""
                    tally.wrong.append(f"{reader.name}, {file}, {how}{damage.name}: {said}")


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _meet(reader: Reader, folder: Path, wanted: Any, mark: Path, sealed: bool) -> tuple[str, str]:
    """Return ``"refused"``, ``"read"`` or ``"wrong"``, and what was said."""
    shutil.rmtree(mark, ignore_errors=True)
    try:
        with limited(LIMIT_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.read(folder)
        outcome = "read", ""
        if reader.summed and not sealed and not _equal(found, wanted):
            outcome = "wrong", "another content was read without a word"
    except SpionError as error:
        sentence = str(error)
        outcome = ("refused", sentence) if sentence.strip() else ("wrong", "refused without a word")
    except Hangs:
        outcome = "wrong", f"it waits after {LIMIT_SECONDS} s"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = "wrong", f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return ("wrong", "it ran what was in the file") if mark.exists() else outcome


def _equal(found: Any, wanted: Any) -> bool:
    return repr(found) == repr(wanted)


def main(arguments: list[str] | None = None) -> int:
    """Attack all readers; return 1 if anything went wrong."""
    from tests.hostile_readers import READERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20, help="random damages of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="only those whose name has this in it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tally = Tally(Counter(), [])
    for reader in READERS:
        if options.reader and options.reader not in reader.name:
            continue
        known = len(tally.wrong)
        for sealed in (False, True)[: 1 + (reader.seal is not None)]:
            attack(reader, options.cases, options.seed, tally, sealed=sealed)
        print(f"{reader.name}: {tally.line()}", flush=True)
        for line in tally.wrong[known:]:
            print(f"  wrong: {line}", flush=True)
    print(tally.line())
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
