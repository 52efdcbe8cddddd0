"""Several ranks of one host against one: the same numbers, a killed rank, speed, what ranks tell.

    python benchmarks/scaling.py --out benchmarks/results/DATE-DEVICE-scaling.md   # all GPUs
    python benchmarks/scaling.py --device cpu --ranks 2 --recipe tests/training/tiny.yaml \
        --large_recipe tests/training/tiny.yaml --large_overrides    # minutes on a CPU

First the results of all ranks must agree with one rank's at ZeRO 0 to 3, and a run that lost a rank
must go on; only then are steps timed. Every run is launch/train.py, dense then sparse. Finished
runs are kept in --folder: after an interruption, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rank_checks import (
    BLOCK_TOLERANCE,
    EVERY_STEP,
    LOSS_TOLERANCE,
    Subject,
    agreement,
    configure,
    row,
    survival,
    table,
    write_json,
)
from rank_runs import COLLECTIVES, Workplace, rows, summary
from timing import machine_lines

from spion_ds.errors import ConfigError, SpionError
from spion_ds.settings import require
from spion_ds.training.config.run import RunConfig
from spion_ds.training.step.evaluation import build_model

# The distance rule cannot fire before its third check, which is the step that forces the switch.
SHORT = (
    "transition.rule=distance",
    "transition.switch_step=null",
    "transition.check_every=8",
    "transition.max_dense_steps=24",
    "training.steps=48",
    "training.log_every=8",
    "training.evaluate_every=48",
    "training.checkpoint_every=48",
    "optimizer.warmup_steps=8",
    "data.validation=16",
    "data.test=16",
)
# Fills a GPU: 47 million parameters, 65 536 tokens a step and rank. SPION-C keeps the same number
# of blocks whatever the maps, so that runs on different ranks do the same work.
LARGE = (
    "model.dim=512",
    "model.ffn_dim=2048",
    "model.layers=12",
    "model.heads=8",
    "model.head_dim=64",
    "model.classifier_dim=512",
    "sparse_attention.variant=c",
    "sparse_attention.density=0.05",
    "transition.resolution=block",
    "optimizer.lr=1.0e-4",
    "training.batch_size=4",
    "training.micro_batch_size=null",
)
GOAL = 0.90


def speeds(place: Workplace, subject: Subject, name: str, ways: Sequence[str]) -> list[str]:
    """Time both phases at each number of ranks; return the table.

    Args:
        name: of the runs.
        ways: of ``"weak"`` (the batch grows with the ranks) and ``"strong"`` (it stays).
    """
    lines = table(
        "scaling",
        "ranks",
        "batch",
        "dense ms",
        "dense tokens/s",
        "efficiency",
        "sparse ms",
        "sparse tokens/s",
        "efficiency",
        "density",
        "peak GB",
    )
    start = place.train(subject.job(f"{name}-1", 1))
    first = summary(start)
    for way in ways:
        for ranks in subject.counts:
            batch = subject.config.batches.total * (ranks if way == "weak" else 1)
            run = start
            if ranks > 1:
                run = place.train(
                    subject.job(f"{name}-{way}-{ranks}", ranks, f"training.batch_size={batch}")
                )
            done = summary(run)
            cells: list[object] = [way, ranks, batch]
            for phase in ("dense", "sparse"):
                speed = done[phase]["tokens_per_second"]
                cells += [f"{1e3 * done[phase]['seconds_per_step']:.2f}", f"{speed:,.0f}"]
                cells.append(f"{efficiency(first, done, phase, ranks):.1%}")
            cells.append(f"{statistics.mean(done['sparse']['density']):.2%}")
            cells.append(f"{max(each['memory_bytes'] for each in rows(run, 'train')) / 1e9:.1f}")
            lines.append(row(*cells))
            place.say(lines[-1])
    return lines


def efficiency(first: dict[str, Any], done: dict[str, Any], phase: str, ranks: int) -> float:
    """Return tokens/s a rank, to those of one rank alone."""
    speed: float = done[phase]["tokens_per_second"] / ranks
    return speed / first[phase]["tokens_per_second"]


def costs(place: Workplace, subject: Subject, name: str) -> list[str]:
    """Time a check step, and alone what ranks tell one another; return the table."""
    config = subject.config
    lines = table("ranks", "what", "ms")
    for ranks in (1, subject.counts[-1]):
        job = subject.job(f"{name}-check-{ranks}", ranks, *EVERY_STEP, "transition.check_every=1")
        plain = summary(_strong_run(place, subject, name, ranks))
        checked = place.train(job)
        step = summary(checked)["dense"]["seconds_per_step"]
        decided = [entry["seconds"] for entry in rows(checked, "check")]
        found = {
            "a dense step": plain["dense"]["seconds_per_step"],
            "a dense step that is a check, with its pictures for TensorBoard": step,
            "of it, after the backward pass: reduction, rule, pattern and broadcast, on rank 0": (
                statistics.median(decided[1:] or decided)
            ),
        }
        if ranks > 1:
            found |= collectives(place, config, f"{name}-collectives-{ranks}", ranks)
        lines += [row(ranks, what, f"{1e3 * value:.3f}") for what, value in found.items()]
    return lines


def _strong_run(place: Workplace, subject: Subject, name: str, ranks: int) -> Path:
    return place.run_folder(f"{name}-strong-{ranks}" if ranks > 1 else f"{name}-1")


def collectives(place: Workplace, config: RunConfig, name: str, ranks: int) -> dict[str, float]:
    """Return the seconds of each collective at the sizes of ``config``, by name."""
    out = place.folder / f"{name}.json"
    if not out.is_file():
        sizes = {
            "length": config.data.sequence_length,
            "block": config.sparse_attention.block,
            "layers": config.model.layers,
            "parameters": sum(p.numel() for p in build_model(config).parameters()),
        }
        words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
        place.torchrun(name, ranks, [str(COLLECTIVES), *words, "--out", str(out)])
        place.say(f"{name}: measured")
    return json.loads(out.read_text())


def large(place: Workplace, subject: Subject) -> list[str]:
    """Time a model that fills the GPUs; return its table, the verdict and what limits the rest."""
    lines, ranks = speeds(place, subject, "large", ["weak"]), subject.counts[-1]
    first = summary(place.run_folder("large-1"))
    last = summary(place.run_folder(f"large-weak-{ranks}"))
    found = efficiency(first, last, "sparse", ranks)
    more = last["sparse"]["seconds_per_step"] - first["sparse"]["seconds_per_step"]
    told = collectives(place, subject.config, f"large-collectives-{ranks}", ranks)
    gradients = told["all-reduce of the gradients"]
    return [
        *lines,
        "",
        f"Weak scaling efficiency of the sparse phase on {ranks} ranks: {found:.1%}; the goal of "
        f"{GOAL:.0%} is {'met' if found >= GOAL else '**not met**'}. A sparse step takes "
        f"{1e3 * more:.2f} ms more than on one rank; one all-reduce of all gradients in bfloat16, "
        f"alone, takes {1e3 * gradients:.2f} ms. What is beyond that is not split up: "
        "the wait for the slowest rank, gradients that are reduced in parts or in fp32, the host.",
        "",
        *table("ranks", "alone", "ms"),
        *(row(ranks, what, f"{1e3 * value:.3f}") for what, value in told.items()),
    ]


def make_subject(
    recipe: str, given: Sequence[str], counts: tuple[int, ...], device: str, ways: Sequence[str]
) -> Subject:
    """Return a recipe with short runs, checked for every number of ranks before any starts.

    Raises:
        ConfigError: the recipe, an override or a batch cannot be trained so.
    """
    precision = "bf16" if device == "cuda" else "fp32"
    overrides = [*SHORT, f"training.precision={precision}", *given]
    config = configure(recipe, overrides, 1, device)
    transition = config.transition
    if not config.switches or transition.rule == "fixed" or transition.max_dense_steps is None:
        raise ConfigError(
            f"recipe {recipe!r} as overridden is not forced to switch to sparse attention by "
            "transition.max_dense_steps, as these runs are; leave sparse_attention.mode, "
            "transition.rule and transition.max_dense_steps out of the overrides"
        )
    dense_steps, steps = transition.max_dense_steps, config.training.steps
    require(dense_steps >= 2, "transition.max_dense_steps", dense_steps, "here, from 2 up")
    require(
        steps >= dense_steps + 4,
        "training.steps",
        steps,
        f"here, from {dense_steps + 4} up (transition.max_dense_steps + 4)",
    )
    if hasattr(config.data, "train") and not any(x.startswith("data.train=") for x in given):
        # Weak scaling's largest batch; the same data in every run.
        overrides.append(f"data.train={config.batches.total * counts[-1]}")
    config = configure(recipe, overrides, 1, device)
    for ranks in counts:
        for way in ways:
            batch = config.batches.total * (ranks if way == "weak" else 1)
            configure(recipe, [*overrides, f"training.batch_size={batch}"], ranks, device)
    return Subject(recipe, tuple(overrides), config, counts)


def rank_counts(device: str, wanted: Sequence[int] | None, ranks: int | None) -> tuple[int, ...]:
    """Return the numbers of ranks to train with, 1 first.

    Raises:
        ConfigError: they are not what this machine has, or fewer than two.
    """
    if device == "cpu":
        present = 2 if ranks is None else ranks
    elif ranks is not None:
        raise ConfigError(f"--ranks is {ranks}, but it is for --device cpu; use --gpus")
    else:
        present = torch.cuda.device_count()
    if present < 2:
        raise ConfigError(
            f"there are {present} {'GPU' if device == 'cuda' else 'rank'}(s), and scaling needs at "
            "least two; try the script with --device cpu --ranks 2"
        )
    powers = [2**power for power in range(present.bit_length())]
    counts = tuple(sorted({1, *(powers if wanted is None else wanted)}))
    if counts[0] < 1 or counts[-1] > present or len(counts) < 2:
        raise ConfigError(
            f"--gpus is {' '.join(map(str, wanted or ()))}; allowed: numbers from 1 to {present}, "
            "one of them above 1"
        )
    return counts


def prepare_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or take one whose finished runs are of this plan.

    Raises:
        ConfigError: it is of another plan.
    """
    kept = folder / "plan.json"
    if kept.is_file() and json.loads(kept.read_text()) != plan:
        raise ConfigError(
            f"--folder is {folder}, which holds the runs of other arguments ({kept}); give them "
            "again, name another folder, or remove it"
        )
    if not kept.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--folder is {folder}, which holds something else; name another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(kept, plan)


def page(sections: dict[str, list[str]], subjects: Sequence[Subject], counts: str) -> str:
    """Return the page: what, where, how, tables."""
    runs = [
        f"`{each.recipe}`, batch {each.config.batches.total} on one rank, L "
        f"{each.config.data.sequence_length}, {each.config.model.layers} layers, "
        f"{each.config.model.heads} heads × {each.config.model.head_dim}, "
        f"{each.config.training.precision}"
        for each in subjects
    ]
    lines = [
        "# Several ranks of one host",
        "",
        *machine_lines(),
        f"Ranks: {counts}; {libraries()}.",
        "",
    ]
    lines += [f"{name}: {text}.\n" for name, text in zip(("Recipe", "Large"), runs, strict=True)]
    lines += [
        "NVLink multicast is off. Each run is dense, then sparse, its switch forced; every rank's "
        "layouts had rank 0's digest at the switch and at each checkpoint, else the run would have "
        "ended. Tokens are sequence positions, padding included; efficiency is tokens/s a rank to "
        "those of one rank; step times are medians that leave out a phase's first row, checks, "
        "evaluations and checkpoints.",
    ]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join([*lines, ""])


def libraries() -> str:
    """Return the versions of what the ranks talk through."""
    names = f"DeepSpeed {metadata.version('deepspeed')}"
    if torch.cuda.is_available():
        names += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return names


def measure(place: Workplace, subject: Subject, filling: Subject) -> tuple[dict, bool]:
    """Return the page's sections and whether the ranks agree; speeds only if they do."""
    precision = subject.config.training.precision
    found, sound = agreement(place, subject)
    bounds = (
        "Against one rank with the same micro-batches. Losses are compared step by step, relative; "
        f"{LOSS_TOLERANCE[precision]:g} is allowed in {precision}. Blocks: "
        f"{BLOCK_TOLERANCE[precision]:.0%} of those kept may differ in {precision}"
        + ("." if precision == "fp32" else ", those within rounding of a threshold.")
    )
    sections = {"The same numbers": [bounds, "", *found]}
    if sound:
        sections["A killed rank"], sound = survival(place, subject)
    if not sound:
        place.say("**the ranks do not agree: no speeds**")
        return sections, False
    sections["Speed of the recipe, ZeRO 0"] = speeds(place, subject, "recipe", ["weak", "strong"])
    sections["What a check costs, and what ranks tell one another"] = costs(
        place, subject, "recipe"
    )
    sections["A model that fills the ranks, ZeRO 0"] = large(place, filling)
    return sections, True


def main() -> int:
    """Check, time, print, and write the page; return 1 if ranks do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: 1 2 4 8 … of those present")
    parser.add_argument("--ranks", type=int, help="with --device cpu: most ranks (default 2)")
    parser.add_argument("--recipe", default="listops")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--large_recipe", default="pathfinder128", help="that fills a GPU")
    parser.add_argument("--large_overrides", nargs="*", default=LARGE, metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"), help="of the runs")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    given = parser.parse_args()
    try:
        counts = rank_counts(given.device, given.gpus, given.ranks)
        subject = make_subject(
            given.recipe, given.overrides, counts, given.device, ["weak", "strong"]
        )
        filling = make_subject(
            given.large_recipe, given.large_overrides, counts, given.device, ["weak"]
        )
        plan = {"device": given.device, "counts": list(counts)}
        for name, each in (("recipe", subject), ("large", filling)):
            plan[name] = [each.recipe, *each.overrides]
        prepare_folder(given.folder, plan)
        place = Workplace(given.folder.resolve(), given.device, say)
        sections, sound = measure(place, subject, filling)
    except SpionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = page(sections, (subject, filling), ", ".join(map(str, counts)))
    (given.folder / "page.md").write_text(text, encoding="utf-8")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    print(text)
    return 0 if sound else 1


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


if __name__ == "__main__":
    # An exception, so that the ranks are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
