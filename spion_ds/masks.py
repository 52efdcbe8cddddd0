"""Block masks as files, for any model, and a command that looks at them.

    from spion_ds.masks import load_masks, save_masks

python -m spion_ds.masks show PLACE         # a table: what each layer keeps
python -m spion_ds.masks png PLACE FILE     # a picture
python -m spion_ds.masks diff A B           # exit code 0 if they keep the same blocks, else 1
python -m spion_ds.masks export PLACE FILE  # a masks file, which load_masks reads
"""

from __future__ import annotations

import sys

from spion_ds.switching.mask_files import LayerMask, load_masks, read_masks, save_masks

__all__ = ["LayerMask", "load_masks", "read_masks", "save_masks"]


if __name__ == "__main__":
    # Here: what reads runs is not for those who only load masks.
    from spion_ds.inference.mask_commands import main

    sys.exit(main())
