"""spion_ds.install(): code written for the old package runs as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.training.launching import environment

OLD_CODE = Path(__file__).parent / "old_code.py"
INSTALL = "import runpy, sys, spion_ds; spion_ds.install();"
RUN = INSTALL + "runpy.run_path(sys.argv[1], run_name='__main__')"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script, *arguments]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)


def test_code_written_for_the_old_package_runs_unmodified():
    result = run(RUN, str(OLD_CODE))
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", result.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    # Two routes of the same float16 numbers: a few roundings of values around 1.
    assert float(re.findall(r"difference ([0-9.]+)", result.stdout)[0]) < 0.01


def test_the_old_code_mentions_nothing_of_ours():
    assert not re.search(r"^\s*(import|from) spion_ds", OLD_CODE.read_text(), re.MULTILINE)


def test_every_old_module_is_this_packages_once_asked_for():
    names = "sparsity_config matmul softmax sparse_self_attention bert_sparse_self_attention "
    names += "sparse_attention_utils"
    script = f"""
import importlib, sys
import spion_ds.ops.sparse_attention as new
assert "deepspeed" not in sys.modules  # nothing is installed unless asked for
try:  # where DeepSpeed still has the package
    import deepspeed.ops.sparse_attention
except ImportError:
    pass
import spion_ds
spion_ds.install()
spion_ds.install()
import deepspeed.ops.sparse_attention as old
assert old is new, old
assert sys.modules["deepspeed.ops"].sparse_attention is new
for name in "{names}".split():
    module = importlib.import_module("deepspeed.ops.sparse_attention." + name)
    assert module.__name__ == "spion_ds.ops.sparse_attention." + name, module
print("fine")
"""
    result = run(script)
    assert "fine" in result.stdout, result.stderr[-3000:]
