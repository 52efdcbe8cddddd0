"""The Hopper kernels against the reference, and what they say where they cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spion_ds import compiling
from spion_ds.attention import BlockLayout, block_sparse_attention, hopper_backend
from spion_ds.errors import ConfigError

from .cases import ON_GPU, Case, assert_is_the_reference, evaluate, make

_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not _IS_HOPPER, reason="no CUDA device of capability 9.0")

CASES = [
    Case(block=block, head_dim=head_dim, dtype=dtype, **features)
    for block in (64, 128)
    for head_dim in (64, 128)
    for dtype in (torch.bfloat16, torch.float16)
    for features in (
        {"lengths": "odd", "kept": "hot_columns"},
        {"lengths": "odd", "kept": "empty_rows", "padding": "holes", "pruned": "excluded"},
        {"kept": "hot_columns", "per_head": True, "grouped": True, "padding": "tail"},
    )
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, device):
    assert_is_the_reference(case, "hopper", ON_GPU, device)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("poisoned")
def test_writes_every_element_the_same_way_twice(device):
    case = Case(block=64, head_dim=64, dtype=torch.bfloat16, lengths="odd", kept="empty_rows")
    inputs = make(case, ON_GPU, device)
    first, second = evaluate(inputs, "hopper"), evaluate(inputs, "hopper")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"head_dim": 32}, "head_dim 64 and 128"),
        ({"block": 32}, "blocks of"),
        ({"causal": True}, "no causal masking"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"scale": -1.0}, "scale above 0"),
        ({}, "capability 9.0"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_named(change, words):
    values = {"dtype": torch.bfloat16, "head_dim": 64, "block": 64, **change}
    options = {name: x for name, x in values.items() if name in ("causal", "dropout_p", "scale")}
    q = torch.randn(1, 1, 64, values["head_dim"], dtype=values["dtype"])
    layout = BlockLayout.from_mask(torch.eye(-(-64 // values["block"])), values["block"])
    with pytest.raises(ConfigError, match=words):
        block_sparse_attention(q, q, q, layout, backend="hopper", **options)


def test_a_shipped_library_is_loaded_and_nothing_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_NO_COMPILE", "1")
    load = hopper_backend.load.__wrapped__  # what this process has loaded is not asked
    with pytest.raises(ConfigError, match="SPION_DS_NO_COMPILE is set"):
        load()
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    shipped = tmp_path / "_hopper.cpython-311-x86_64-linux-gnu.so"
    shipped.touch()
    load()
    assert loaded == [shipped]


def test_it_is_compiled_for_wgmma_into_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    asked: dict[str, Any] = {}

    def compile(**arguments: Any) -> None:
        asked.update(arguments)
        (Path(arguments["build_directory"]) / f"{arguments['name']}.so").touch()

    monkeypatch.setattr("torch.utils.cpp_extension.load", compile)
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    hopper_backend.load.__wrapped__()
    assert loaded == [compiling.HOPPER.cached()]
    assert loaded[0].is_file()
    names = {Path(source).name for source in asked["sources"]}
    assert {"binding.cpp", "forward.cu", "backward_dq.cu", "backward_dkv.cu"} <= names
    assert "-gencode=arch=compute_90a,code=sm_90a" in asked["extra_cuda_cflags"]
