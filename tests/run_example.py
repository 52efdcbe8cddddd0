"""Runs an example as it stands; DeepSpeed's CPU collectives, which compile for a minute, left out.

usage: run_example.py EXAMPLE FOLDER
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from spion_ds.distributed.process_group import import_deepspeed

if __name__ == "__main__":
    import_deepspeed()
    example = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(example.parent))
    sys.argv = [str(example), *sys.argv[2:]]
    runpy.run_path(str(example), run_name="__main__")
