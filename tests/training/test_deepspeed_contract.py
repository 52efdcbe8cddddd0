"""What the package relies on in DeepSpeed holds in the version that is installed.

Only two files name what DeepSpeed does not promise: distributed/process_group.py, which starts
ranks before there is an engine, and training/step/deepspeed_engine.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.training.launching import LIMIT_SECONDS, ROOT, environment

CONTRACT = Path(__file__).with_name("deepspeed_contract.py")
PROMISES = [
    node.name
    for node in ast.parse(CONTRACT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
REACHING = {
    "distributed/process_group.py",
    "training/step/deepspeed_engine.py",
    "training/checkpoints/universal.py",  # its converter, as it is
    "training/config/deepspeed.py",  # what its configuration needs
}
# Attributes of an engine and of its optimizers.
INNER_NAMES = {
    "_copy_recovery_script",
    "allreduce_gradients",
    "basic_optimizer",
    "bfloat16_enabled",
    "checkpoint_engine",
    "enable_backward_allreduce",
    "fp16_groups",
    "fp32_groups",
    "tput_timer",
    "zero_optimization_stage",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What failed of each promise, [] where it held in every setup."""
    report = tmp_path_factory.mktemp("contract") / "report.xml"
    words = [sys.executable, "-m", "pytest", str(CONTRACT), f"--junitxml={report}"]
    words += ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-o", "addopts="]
    child = subprocess.run(
        words,
        cwd=ROOT,
        env=environment(gpu=True),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert report.is_file(), child.stdout[-3000:] + child.stderr[-3000:]
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"]
        failed = [what.text or "" for what in case if what.tag in ("failure", "error", "skipped")]
        found.setdefault(name.split("[")[0], []).extend(f"{name}: {text}" for text in failed)
    return found


@pytest.mark.parametrize("promise", PROMISES, ids=[name[5:] for name in PROMISES])
def test_deepspeed_still_does_what_is_relied_on(
    promise: str, outcomes: dict[str, list[str]]
) -> None:
    assert promise in outcomes
    assert not outcomes[promise], "\n".join(outcomes[promise])


def test_no_other_file_reaches_into_deepspeed() -> None:
    wrong = []
    for path in sorted([*(ROOT / "spion_ds").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        if path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).as_posix() in REACHING:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or ""}
            elif isinstance(node, ast.Attribute) and node.attr in INNER_NAMES:
                names = {f"deepspeed.{node.attr}"}
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] == "deepspeed"]
    assert not wrong
