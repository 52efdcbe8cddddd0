"""install(): lets code that imports ``deepspeed.ops.sparse_attention`` find this package's."""

from __future__ import annotations

import importlib
import sys

_OLD = "deepspeed.ops.sparse_attention"
_NEW = "spion_ds.ops.sparse_attention"
_SUBMODULES = (
    "bert_sparse_self_attention",
    "matmul",
    "softmax",
    "sparse_attention_utils",
    "sparse_self_attention",
    "sparsity_config",
)


def install() -> None:
    """Make ``deepspeed.ops.sparse_attention`` this package's, for this process.

    Where DeepSpeed has no such package (0.19.7 and newer) it becomes importable again, with its
    submodules; where it has one, it is replaced. Call it before the code that imports the old
    names: what was imported earlier stays what it was. Calling it again changes nothing.
    """
    ops = importlib.import_module("deepspeed.ops")
    new = importlib.import_module(_NEW)
    for name in [name for name in sys.modules if name == _OLD or name.startswith(f"{_OLD}.")]:
        del sys.modules[name]
    sys.modules[_OLD] = new
    for name in _SUBMODULES:
        sys.modules[f"{_OLD}.{name}"] = importlib.import_module(f"{_NEW}.{name}")
    ops.sparse_attention = new  # type: ignore[attr-defined]
