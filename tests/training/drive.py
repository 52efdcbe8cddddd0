"""Runs several training sessions in one process group; started by a launcher, once a rank.

usage: drive.py FILE, a JSON list of TrainOptions as mappings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from spion_ds.distributed.process_group import end_process, leave
from spion_ds.training.session import TrainOptions, train


def main() -> None:
    for number, values in enumerate(json.loads(Path(sys.argv[-1]).read_text())):
        for name in ("run_dir", "data_dir"):
            values[name] = Path(values[name])
        # A session must not depend on what the process drew before it.
        torch.manual_seed(1000 + number)
        train(TrainOptions(**values))
    leave()


if __name__ == "__main__":
    main()
    end_process(0)
