"""Test a trained model, compare it with dense attention, predict inputs, or export it.

evaluate.py runs/listops                         accuracy of the best checkpoint on the test set
evaluate.py runs/listops --compare dense         the same weights with dense attention beside it
evaluate.py runs/listops --export model          a folder that spion_ds.models.load_model reads
evaluate.py model --input inputs.txt             a JSON line with label and probabilities each
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spion_ds.distributed.ending import run_command
from spion_ds.distributed.process_group import end_process
from spion_ds.inference.commands import PRECISIONS, EvaluateOptions, run_evaluate


def main() -> int:
    """Parse the command line and do it; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="a run's folder (its best), a checkpoint's, or an exported model's"
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument(
        "--batch_size", type=int, help="samples a rank at once; default: as trained"
    )
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: the weights' own")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument(
        "--compare",
        choices=("dense",),
        help="evaluate the same weights with dense attention too, and print both",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="predict the inputs of a file, one a line, - for standard input: the task's text or "
        "token ids",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write weights, masks and configuration there"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    given = vars(parser.parse_args())
    del given["local_rank"]
    return run_command(lambda: run_evaluate(EvaluateOptions(**given)))


if __name__ == "__main__":
    end_process(main())
