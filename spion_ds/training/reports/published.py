"""Published test accuracies of the Long Range Arena, to print beside one's own."""

from __future__ import annotations

# Per cent; where each row was published.
LRA_PAPER = "Tay et al., Long Range Arena, ICLR 2021"
SKYFORMER = "Chen et al., Skyformer, NeurIPS 2021 (tiny model)"
SAT_LOGS = "the logs published with SAT, IEEE Access 12, 2024"
S4 = "Gu et al., S4, ICLR 2022"
MEGA = "Ma et al., MEGA, ICLR 2023"

_TASKS = ("listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128")
_ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Transformer", LRA_PAPER, ("36.4", "64.3", "57.5", "42.4", "71.4", "fails")),
    ("BigBird", LRA_PAPER, ("36.1", "64.0", "59.3", "40.8", "74.9", "fails")),
    ("Transformer", SKYFORMER, ("38.4", "62.0", "80.7", "40.6", "65.3", "–")),
    ("BigBird", SKYFORMER, ("39.3", "63.9", "80.3", "43.2", "68.7", "–")),
    ("Skyformer", SKYFORMER, ("38.7", "64.7", "82.1", "40.8", "70.7", "–")),
    ("SAT", SAT_LOGS, ("37.5 ± 0.7", "–", "–", "42.2 ± 0.8", "–", "–")),
    ("S4", S4, ("59.6", "86.8", "90.9", "88.7", "94.2", "96.4")),
    ("MEGA", MEGA, ("63.1", "90.4", "91.3", "90.4", "96.0", "98.0")),
)


def published(task: str) -> list[tuple[str, str, str]]:
    """Return (model, accuracy in per cent as printed, source) of a task; [] for an unknown one."""
    if task not in _TASKS:
        return []
    place = _TASKS.index(task)
    return [(model, row[place], source) for model, source, row in _ROWS if row[place] != "–"]
