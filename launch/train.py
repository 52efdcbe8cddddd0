"""Train from dense to sparse: python, deepspeed, torchrun and mpirun all start this file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spion_ds.distributed.standard_streams import mend_streams
from spion_ds.distributed.stopping import StopRequest


def main() -> int:
    """Parse the command line and train; return the exit code."""
    mend_streams()
    with StopRequest() as request:  # before the imports, which take seconds
        from spion_ds.distributed.ending import run_command
        from spion_ds.training.session import TrainOptions, train

        options = TrainOptions(**parse())
        return run_command(lambda: train(options, request))


def parse() -> dict[str, Any]:
    """Return what the command line says, as TrainOptions takes it."""
    from spion_ds.training.config.recipe_files import attention_names, recipe_names
    from spion_ds.training.session import DEFAULT_RECIPE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe",
        help=f"one of {', '.join(recipe_names())}, or a .yaml file; default {DEFAULT_RECIPE}",
    )
    parser.add_argument(
        "--attention",
        help=f"instead of the recipe's: {', '.join(attention_names())}",
    )
    parser.add_argument("--ds_config", help="DeepSpeed JSON; default: ZeRO stage 0")
    parser.add_argument("--run_dir", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--run_name", help="name of this run; default: the recipe's")
    parser.add_argument(
        "--if_taken",
        default="suffix",
        choices=("suffix", "error"),
        help="when the name is taken: take the next free one, or stop; default suffix",
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on from a run's latest checkpoint, or from one named; default: run_dir/run_name; "
        "auto: go on if there is one, else start",
    )
    parser.add_argument("--stop_at", type=int, metavar="STEP", help="save and stop after this step")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="recipe overrides"
    )
    # Options and overrides may be mixed in any order.
    given = vars(parser.parse_intermixed_args())
    del given["local_rank"]
    return given


if __name__ == "__main__":
    code = main()
    from spion_ds.distributed.process_group import end_process

    end_process(code)
