"""Kills ranks at random moments, goes on, and compares with runs that were left alone.

    python -m tests.fault_suite --kills 20 --seed 0

Each case trains the tests' recipe on 2 to 4 CPU ranks at a random ZeRO stage. One random rank gets
kill -9 at a random call of a random place, or after a random time. The others must end with exit
code 3 and name it. Then the run goes on with --resume auto; its losses, masks, evaluations and
test accuracy must be, bit for bit, those of the same ranks and stage undisturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.training.launching import (
    LIMIT_SECONDS,
    TINY,
    digest,
    losses,
    rows,
    session,
    start_ranks,
    summary,
)

FAULTY = str(Path(__file__).parent / "training" / "faulty.py")
STAGES = (0, 1, 2, 3)
# Batches of 12 divide over 2, 3 and 4 ranks; a rank is missed within seconds.
OVERRIDES = [
    "training.batch_size=12",
    "training.checkpoint_every=2",
    "training.rank_timeout_seconds=5",
]
# Place → its calls in an undisturbed run of 12 steps, which switches after the 6th.
DENSE, SPARSE = range(1, 7), range(7, 13)
MOMENTS = {
    "dense phase": ("step", DENSE),
    "sparse phase": ("step", SPARSE),
    "check step": ("map", range(1, 7)),
    "broadcast": ("broadcast", range(1, 4)),
    "checkpoint": ("save", range(1, 7)),
    "checkpoint weights": ("weights", range(1, 7)),
    "checkpoint write": ("write", range(1, 13)),
    "checkpoint rename": ("publish", range(1, 7)),
    "checkpoint removal": ("prune", range(1, 7)),
    "evaluation": ("evaluate", range(1, 3)),
}
# These happen on rank 0 alone.
FIRST_RANK_ONLY = ("checkpoint write", "checkpoint rename", "checkpoint removal")
ANY_TIME = "any time"


def values_of(name: str, stage: int, **more: Any) -> dict[str, Any]:
    """Return a session that goes on with run ``name`` or starts it."""
    plain = {"run_name": name, "resume": "auto", "recipe": str(TINY), "overrides": OVERRIDES}
    return {**plain, "stage": stage, **more}


def run_sessions(folder: Path, name: str, ranks: int, sessions: list[dict[str, Any]]) -> list[str]:
    """Run sessions in one process group to their ends and return those, as rank 0 wrote them."""
    plan = folder / f"{name}.json"
    plan.write_text(json.dumps([session(folder, **values) for values in sessions]))
    log = folder / f"{name}.log"
    for process in start_ranks(ranks, [FAULTY, str(plan)], folder, log):
        if process.wait(LIMIT_SECONDS * len(sessions)):
            raise SystemExit(f"a rank failed:\n{log.read_text()[-5000:]}")
    return [json.loads(line) for line in plan.with_suffix(".0").read_text().splitlines()]


def draw(generator: random.Random, number: int) -> dict[str, Any]:
    """Return a case: ranks, stage, victim and moment."""
    moment = generator.choice([*MOMENTS, ANY_TIME])
    ranks = generator.choice((2, 3, 4))
    rank = 0 if moment in FIRST_RANK_ONLY else generator.randrange(ranks)
    case = {"name": f"kill{number}", "ranks": ranks, "stage": generator.choice(STAGES)}
    case |= {"moment": moment, "rank": rank, "seconds": generator.uniform(0.0, 8.0)}
    if moment != ANY_TIME:
        place, calls = MOMENTS[moment]
        case["fault"] = {
            "kind": "kill",
            "place": place,
            "rank": rank,
            "at": generator.choice(calls),
        }
    return case


def kill(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Run a case until it is over, and return what was seen."""
    plan, log = folder / f"{case['name']}.json", folder / f"{case['name']}.log"
    values = values_of(case["name"], case["stage"], fault=case.get("fault"))
    plan.write_text(json.dumps([session(folder, **values)]))
    processes = start_ranks(case["ranks"], [FAULTY, str(plan)], folder, log)
    victim = processes[case["rank"]]
    run = folder / "runs" / case["name"]
    if case["moment"] == ANY_TIME:
        while victim.poll() is None and not run.is_dir():
            time.sleep(0.05)
        time.sleep(case["seconds"])
        victim.kill()
    victim.wait(LIMIT_SECONDS)
    died = time.monotonic()
    codes = [process.wait(LIMIT_SECONDS) for process in processes]
    latest = run / "checkpoints" / "latest"
    saved = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    seen = max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0
    error = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    return {
        "killed": codes[case["rank"]] == -9,
        "finished": (run / "summary.json").exists(),
        "codes": codes,
        "seconds": time.monotonic() - died,
        "lost": max(seen - saved, 0),
        "error": error[0] if error else "",
    }


def problems(run: Path, undisturbed: Path, case: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """Return what is not as promised."""
    found = []
    # Killed after its work was done, it is missed by nobody.
    if seen["killed"] and not seen["finished"]:
        others = [code for rank, code in enumerate(seen["codes"]) if rank != case["rank"]]
        if set(others) != {3}:
            found.append(f"exit codes {seen['codes']}")
        if f"rank {case['rank']} " not in seen["error"]:
            found.append(f"said {seen['error']!r}")
    ours, theirs = losses(run), losses(undisturbed)
    if ours != theirs:
        steps = [step for step in theirs if ours.get(step) != theirs[step]]
        found.append(f"other losses in steps {steps}: {ours} and {theirs}")
    if digest(run) != digest(undisturbed):
        found.append("other masks")
    if rows(run, "validation") != rows(undisturbed, "validation"):
        found.append("other evaluations")
    if summary(run)["test_accuracy"] != summary(undisturbed)["test_accuracy"]:
        found.append("another test accuracy")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    cases = [draw(generator, number) for number in range(options.kills)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        seen = {}
        for case in cases:
            seen[case["name"]] = result = kill(folder, case)
            at = case.get("fault", {}).get("at", f"{case['seconds']:.1f} s")
            print(
                f"{case['name']}: rank {case['rank']} of {case['ranks']}, ZeRO {case['stage']}, "
                f"{case['moment']} {at}: others ended after {result['seconds']:.1f} s, "
                f"{result['lost']} step(s) to take again; {result['error'][:120]}",
                flush=True,
            )
        failures: dict[str, list[str]] = {}
        for ranks in sorted({case["ranks"] for case in cases}):
            ours = [case for case in cases if case["ranks"] == ranks]
            stages = {case["stage"] for case in ours}
            sessions = [values_of(f"whole{ranks}-{stage}", stage) for stage in stages]
            sessions += [values_of(case["name"], case["stage"]) for case in ours]
            # ZeRO-3 comes last: DeepSpeed replaces F.linear for the rest of the process, by one
            # that rounds differently.
            sessions.sort(key=lambda values: values["stage"])
            ends = run_sessions(folder, f"resume{ranks}", ranks, sessions)
            ended = dict(zip([values["run_name"] for values in sessions], ends, strict=True))
            for case in ours:
                name, whole = case["name"], f"whole{ranks}-{case['stage']}"
                if ended[name] != "finished":
                    failures[name] = [ended[name]]
                else:
                    runs = folder / "runs"
                    failures[name] = problems(runs / name, runs / whole, case, seen[name])
    bad = {name: found for name, found in failures.items() if found}
    for name, found in bad.items():
        print(f"{name}: {'; '.join(found)}")
    killed = [result for result in seen.values() if result["killed"]]
    moments = Counter(case["moment"] for case in cases if seen[case["name"]]["killed"])
    print(f"{len(cases)} cases, {len(killed)} ranks killed: {dict(moments)}")
    slowest = max((result["seconds"] for result in killed), default=0.0)
    print(f"steps taken again: {sum(result['lost'] for result in killed)}")
    print(f"the others ended within {slowest:.1f} s")
    print(f"{len(cases) - len(bad)} as promised, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
