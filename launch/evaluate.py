"""Evaluate a checkpoint: accuracy, phase, density a layer, throughput, trivial baselines."""

from __future__ import annotations

import argparse
from pathlib import Path

from spion_ds.training.ranks import end_process
from spion_ds.training.session import EvaluateOptions, evaluate_checkpoint, run_command


def main() -> int:
    """Parse the command line and evaluate; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder (its best), or a checkpoint's"
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument(
        "--batch_size", type=int, help="samples a rank at once; default: as trained"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    given = vars(parser.parse_args())
    del given["local_rank"]
    return run_command(lambda: evaluate_checkpoint(EvaluateOptions(**given)))


if __name__ == "__main__":
    end_process(main())
