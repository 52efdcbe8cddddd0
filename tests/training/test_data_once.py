"""The data is made once a cache folder, by one rank, wherever the nodes keep it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from spion_ds.data.listops import task as listops
from spion_ds.distributed.process_group import Ranks
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import build_run_config
from spion_ds.training.session import prepare_data
from tests.training.launching import TINY

NODES, LOCAL = 2, 2


class TwoNodes:
    """The part of the ranks' agreement that preparing data needs, between processes."""

    def __init__(self, barrier: Barrier) -> None:
        self.barrier = barrier

    def together(self, work: Callable[[], Any]) -> Any:
        result = work()
        self.barrier.wait()
        return result


def prepare(rank: int, data_dir: Path, made: Path, barrier: Barrier) -> None:
    """Prepare the tests' data as a rank, and write down whether this rank made it."""
    build = listops._build_generated

    def noted(config: Any, folder: Path) -> None:
        with made.open("a") as file:
            file.write(f"{rank} {folder.parent}\n")
        build(config, folder)

    config = build_run_config(
        read_recipe(str(TINY)), None, (), world_size=NODES * LOCAL, device_type="cpu"
    )
    ranks = Ranks(rank, NODES * LOCAL, rank % LOCAL, LOCAL)
    with mock.patch.object(listops, "_build_generated", noted):
        dataset = prepare_data(config.task, config.data, data_dir, ranks, TwoNodes(barrier))
    os._exit(0 if len(dataset.train) == 64 else 1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-folder", "folder-a-node"])
def test_data_is_made_once_a_cache_folder(shared: bool, tmp_path: Path) -> None:
    fork, made = multiprocessing.get_context("fork"), tmp_path / "made"
    folders = [tmp_path / ("data" if shared else f"data{node}") for node in range(NODES)]
    barrier = fork.Barrier(NODES * LOCAL, timeout=60)
    processes = [
        fork.Process(target=prepare, args=(rank, folders[rank // LOCAL], made, barrier))
        for rank in range(NODES * LOCAL)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * (NODES * LOCAL)
    makers = [line.split() for line in made.read_text().splitlines()]
    assert sorted(folder for _, folder in makers) == sorted({str(folder) for folder in folders})
    # The first rank of a node makes it, no other.
    assert {int(rank) % LOCAL for rank, _ in makers} == {0}
