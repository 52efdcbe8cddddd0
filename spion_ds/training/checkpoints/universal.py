"""DeepSpeed's own conversion to a universal checkpoint, in a process that runs no code from files.

``python -m spion_ds.training.checkpoints.universal`` takes the arguments of
``deepspeed.checkpoint.ds_to_universal``.
"""

from __future__ import annotations

from spion_ds.training.step.deepspeed_engine import restricted_loads


def main() -> None:
    """Convert as the command line says."""
    with restricted_loads():
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
