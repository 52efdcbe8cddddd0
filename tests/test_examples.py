"""The examples, as a user runs them: on one rank and two, and started again after a kill."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from spion_ds.masks import read_masks
from tests.training.launching import ROOT, command, environment, launch

pytestmark = pytest.mark.ranks
RUN = Path(__file__).parent / "run_example.py"
EXAMPLES = ROOT / "examples"
# Each is killed after this step, in the dense phase or after the switch, on so many ranks.
KILLED_AFTER = {
    "plain_pytorch": (6, 1),
    "own_deepspeed": (14, 2),
    "with_accelerate": (10, 1),
    "with_lightning": (18, 1),
}
NEEDS = {"with_accelerate": "accelerate", "with_lightning": "lightning"}
LAST = 24


def words(example: str, ranks: int, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    start = command("torchrun", ranks) if ranks > 1 else command("python", 1)
    return [*start, str(RUN), str(EXAMPLES / f"{example}.py"), str(folder)]


def losses(output: str) -> dict[int, str]:
    """Return what was printed of each step: its loss, with all digits, and its phase."""
    found = re.findall(r"step (\d+): (loss \S+, (?:dense|sparse))", output)
    return {int(step): line for step, line in found}


def kill_after(step: int, started: list[str], cwd: Path) -> dict[int, str]:
    """Start, kill -9 all processes once a step was printed, and return what was printed."""
    process = subprocess.Popen(
        started,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        if step in losses(printed):
            break
    launcher = psutil.Process(process.pid)
    for one in [launcher, *launcher.children(recursive=True)]:  # torchrun's ranks have own sessions
        one.kill()
    process.communicate()
    assert step in losses(printed), printed[-3000:]
    return losses(printed)


@pytest.mark.parametrize("example", KILLED_AFTER)
def test_an_example_ends_sparse_alike_on_any_ranks_and_after_a_kill(
    example: str, tmp_path: Path
) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"{NEEDS[example]} is not installed")
    runs = {
        ranks: launch(words(example, ranks, tmp_path / f"{ranks}"), tmp_path) for ranks in (1, 2)
    }
    step, ranks = KILLED_AFTER[example]
    whole = losses(runs[ranks].stdout)
    assert list(whole) == list(range(1, LAST + 1))
    assert whole[LAST].endswith("sparse")

    stopped = kill_after(step, words(example, ranks, tmp_path / "killed"), tmp_path)
    rest = losses(launch(words(example, ranks, tmp_path / "killed"), tmp_path).stdout)
    assert min(rest) > 1, "it began anew"
    assert {**stopped, **rest} == whole

    one, two, killed = (
        read_masks(tmp_path / name / "masks.safetensors") for name in ("1", "2", "killed")
    )
    for layers in zip(*(found.values() for found in (one, two, killed)), strict=True):
        masks = [layer.mask for layer in layers]
        assert masks[0].shape == (4, 16, 16)
        assert not torch.equal(masks[0][0], masks[0][1])
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[1], masks[2])


def test_examples_are_short() -> None:
    long = {
        path.name: count
        for path in EXAMPLES.glob("*.py")
        if (count := len(path.read_text().splitlines())) >= 60
    }
    assert not long
