"""Train recipes × attentions × seeds, resuming what was interrupted, and write one table.

    reproduce.py launch/reproduce.yaml --recipes listops pathfinder32 --seeds 0 1 2 --minutes 25
    reproduce.py --recipes listops_small --overrides training.steps=100

The first line's command goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spion_ds.distributed.ending import run_command
from spion_ds.training.config.recipe_files import attention_names
from spion_ds.training.reports.reproduction import ReproduceOptions, read_plan, reproduce


def main() -> int:
    """Parse the command line and train; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "plan",
        nargs="?",
        help="YAML with recipes, attentions, seeds, overrides: launch/reproduce.yaml",
    )
    parser.add_argument("--recipes", nargs="+", default=(), help="instead of the plan's")
    parser.add_argument(
        "--attentions",
        nargs="+",
        default=(),
        help=f"instead of the plan's; none is the recipes' own: {', '.join(attention_names())}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="instead of the plan's")
    parser.add_argument(
        "--overrides", nargs="+", default=(), metavar="section.key=value", help="for all runs"
    )
    parser.add_argument("--ds_config", help="DeepSpeed JSON of all runs; default: ZeRO stage 0")
    parser.add_argument(
        "--launcher", help="words that start a run, e.g. 'torchrun --nproc_per_node 4'"
    )
    parser.add_argument("--run_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument(
        "--minutes",
        type=float,
        help="then the present run saves and stops, which takes it some seconds; exit code 75",
    )
    parser.add_argument("--table_only", action="store_true", help="train nothing, write the table")
    given = vars(parser.parse_args())

    def command() -> None:
        words = {name: given.pop(name) for name in ("recipes", "attentions", "seeds", "overrides")}
        plan = read_plan(given.pop("plan"), **words)
        reproduce(ReproduceOptions(plan, Path(__file__).with_name("train.py"), **given))

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
