"""Kills ranks at random moments, goes on, and compares with runs that were left alone.

    python -m tests.fault_suite --kills 20 --seed 0 --jobs 2 --log kills.txt

Each case trains the tests' recipe on 2 to 4 CPU ranks at a random ZeRO stage. One random rank gets
kill -9 at a random call of a random place, or after a random time. The others must end with exit
code 3 and name it, without a traceback. Then new processes go on with --resume auto; the losses,
masks, evaluations and test accuracy must be, bit for bit, those of the same ranks and stage
undisturbed, and no more steps are taken again than lie between two checkpoints.

In some cases nobody is killed, or the launcher alone, and other processes start on the run while it
trains. They must end with exit code 2 and one sentence, and the run must be the undisturbed one.

Ranks are forked from a process that has imported everything, which costs a quarter of starting
Python anew; from there on they do what launch/train.py does. The cases run side by side, --jobs at
a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.training.launching import (
    LIMIT_SECONDS,
    TINY,
    digest,
    environment,
    losses,
    rows,
    session,
    summary,
)

RANKS, STAGES = (2, 3, 4), (0, 1, 2, 3)
CHECKPOINT_EVERY = 2
# Batches of 12 divide over 2, 3 and 4 ranks. A killed rank is mostly missed at once, by its closed
# connections; the timeout only has to be longer than the longest pause of a rank that lives, which
# is a second at most where there is a core a rank, times the ranks that share one.
OVERRIDES = [
    "training.batch_size=12",
    f"training.checkpoint_every={CHECKPOINT_EVERY}",
    "training.rank_timeout_seconds=15",
]
# Place → its calls in an undisturbed run of 12 steps, which switches after the 6th.
DENSE, SPARSE = range(1, 7), range(7, 13)
PLACES = {
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
SECOND, ORPHANS = "second start", "second start after the launcher's death"
# Below the ports that the kernel gives away: nobody else gets one between two starts.
FIRST_PORT, LAST_PORT = 15000, 32000


@dataclass(frozen=True)
class Case:
    """A rank to kill: at the ``at``-th call of a place, or at a share of the run's time."""

    number: int
    ranks: int
    stage: int
    place: str
    rank: int
    at: float

    @property
    def name(self) -> str:
        return f"kill{self.number:03d}"

    @property
    def has_second(self) -> bool:
        """Whether a second start on the run takes the place of a killed rank."""
        return self.place in (SECOND, ORPHANS)

    @property
    def fault(self) -> dict[str, Any] | None:
        if self.place not in PLACES:
            return None
        return {"kind": "kill", "place": PLACES[self.place][0], "rank": self.rank, "at": self.at}

    def __str__(self) -> str:
        when = f"{self.place} {self.at}"
        if self.place not in PLACES:
            when = f"{self.place}, at {self.at:.0%} of the run's time"
        who = f"{self.ranks} ranks" if self.has_second else f"rank {self.rank} of {self.ranks}"
        return f"{self.name}: {who}, ZeRO {self.stage}, {when}"


@dataclass
class Outcome:
    """What was seen of a case.

    Attributes:
        killed: whether the kill, or the second start, came before the rank had ended.
        codes: exit codes of all ranks.
        ended_seconds: from the kill to the end of the last rank.
        reached: the last step that was logged.
        lost: how many logged steps had to be taken again.
        error: what the user was told.
        wrong: what is not as promised.
        seconds: of the whole case, until the run that went on had ended.
    """

    killed: bool
    codes: list[int | None]
    ended_seconds: float
    reached: int
    lost: int
    error: str
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def draw(generator: random.Random, number: int) -> Case:
    """Return a random case."""
    place = generator.choice([*PLACES, ANY_TIME, SECOND, ORPHANS])
    ranks, stage = generator.choice(RANKS), generator.choice(STAGES)
    rank = 0 if place in FIRST_RANK_ONLY else generator.randrange(ranks)
    at = generator.choice(PLACES[place][1]) if place in PLACES else generator.random()
    return Case(number, ranks, stage, place, rank, at)


def preload() -> None:
    """Import once what all ranks need, on the CPU and with one thread a rank."""
    os.environ.update(environment())
    from spion_ds.distributed.process_group import import_deepspeed
    from spion_ds.extension import operators_available
    from tests.training import faulty  # noqa: F401

    import_deepspeed()
    operators_available()


def be_rank(rank: int, ranks: int, port: int, plan: Path, log: Path) -> None:
    """Be one of the ranks, in a process of its own, to the end of that process."""
    from spion_ds.distributed.process_group import end_process
    from tests.training.faulty import main

    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    end_process(main(plan))


def start(folder: Path, name: str, ranks: int, port: int, **values: Any) -> list[BaseProcess]:
    """Start the ranks of a session; their output goes to ``folder/<name>.log``."""
    plan, log = folder / f"{name}.json", folder / f"{name}.log"
    plan.write_text(json.dumps([session(folder, **values)]))
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=be_rank, args=(rank, ranks, port, plan, log)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for all ranks and return their exit codes; None for one that hangs, and is killed."""
    deadline = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_name_values(name: str, stage: int) -> dict[str, Any]:
    """Return a session that goes on with run ``name`` or starts it."""
    return {
        "run_name": name,
        "resume": "auto",
        "recipe": str(TINY),
        "overrides": OVERRIDES,
        "stage": stage,
    }


def run_whole(folder: Path, ranks: int, stage: int) -> float:
    """Run undisturbed, and return the seconds from the run's folder to its end."""
    name = f"whole{ranks}-{stage}"
    port = FIRST_PORT - 1 - ranks * len(STAGES) - stage
    processes = start(folder, name, ranks, port, **run_name_values(name, stage))
    began = wait_for_run(folder / "runs" / name, processes[0])
    if any(end(processes)):
        raise SystemExit(f"an undisturbed run failed:\n{(folder / f'{name}.log').read_text()}")
    return time.monotonic() - began


def wait_for_run(run: Path, process: BaseProcess) -> float:
    """Return when the run's folder appeared, or its process ended."""
    while process.is_alive() and not run.is_dir():
        time.sleep(0.02)
    return time.monotonic()


def run_case(folder: Path, case: Case, whole_seconds: float) -> Outcome:
    """Kill a rank, go on, compare."""
    began = time.monotonic()
    values = run_name_values(case.name, case.stage)
    port = FIRST_PORT + 2 * case.number % (LAST_PORT - FIRST_PORT)
    processes = start(folder, case.name, case.ranks, port, **values, fault=case.fault)
    victim, run = processes[case.rank], folder / "runs" / case.name
    if case.place == ANY_TIME:
        wait_for_run(run, victim)
        victim.join(case.at * whole_seconds)
        victim.kill()
    victim.join(LIMIT_SECONDS)
    died = time.monotonic()
    codes = end(processes)
    outcome = see(folder, case, codes, time.monotonic() - died)
    resumed = end(start(folder, f"{case.name}-on", case.ranks, port + 1, **values))
    if any(resumed):
        log = (folder / f"{case.name}-on.log").read_text()
        outcome.wrong.append(f"went on to exit codes {resumed}:\n{log[-3000:]}")
    else:
        outcome.wrong += differences(run, folder / "runs" / f"whole{case.ranks}-{case.stage}")
    outcome.seconds = time.monotonic() - began
    return outcome


def launch_ranks(pipe: Connection, *arguments: Any, **values: Any) -> None:
    """Be a launcher: start ranks, which inherit ``pipe``, and wait for them."""
    end(start(*arguments, **values))


def run_second(folder: Path, case: Case, whole_seconds: float) -> Outcome:
    """Start ranks on a run that others train, and compare what it became."""
    began = time.monotonic()
    values = run_name_values(case.name, case.stage)
    port = FIRST_PORT + 2 * case.number % (LAST_PORT - FIRST_PORT)
    run, fork = folder / "runs" / case.name, multiprocessing.get_context("fork")
    ended, theirs = fork.Pipe(duplex=False)
    arguments = (theirs, folder, case.name, case.ranks, port)
    launcher = fork.Process(target=launch_ranks, args=arguments, kwargs=values)
    launcher.start()
    theirs.close()
    wait_for_run(run, launcher)
    time.sleep(case.at * whole_seconds)
    if case.place == ORPHANS:
        launcher.kill()
    started = time.monotonic()
    codes = end(start(folder, f"{case.name}-second", case.ranks, port + 1, **values))
    seconds = time.monotonic() - started
    ended.poll(LIMIT_SECONDS)  # until all first ranks have closed their end
    launcher.join()
    log = (folder / f"{case.name}-second.log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    # Where the first had finished, the second finds nothing to do.
    refused = codes != [0] * case.ranks
    outcome = Outcome(refused, codes, seconds, 0, 0, errors[0] if errors else "")
    if refused and codes != [2] * case.ranks:
        outcome.wrong.append(f"exit codes {codes}")
    if refused and [f"the run {run} is being trained by" in error for error in errors] != [True]:
        outcome.wrong.append(f"said {errors}")
    for text in (log, (folder / f"{case.name}.log").read_text()):
        if "Traceback" in text:
            outcome.wrong.append(f"a traceback:\n{text[-3000:]}")
    outcome.wrong += differences(run, folder / "runs" / f"whole{case.ranks}-{case.stage}")
    outcome.seconds = time.monotonic() - began
    return outcome


def see(folder: Path, case: Case, codes: list[int | None], ended_seconds: float) -> Outcome:
    """Return what a killed rank left, and what is wrong about it."""
    run, log = folder / "runs" / case.name, (folder / f"{case.name}.log").read_text()
    latest = run / "checkpoints" / "latest"
    saved = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    reached = max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    error = errors[0] if errors else ""
    killed, lost = codes[case.rank] == -9, max(reached - saved, 0)
    outcome = Outcome(killed, codes, ended_seconds, reached, lost, error)
    others = {code for rank, code in enumerate(codes) if rank != case.rank}
    # Killed after its work was done, it is missed by nobody.
    finished = (run / "summary.json").exists()
    if killed and not (finished and others == {0}):
        if others != {3}:
            outcome.wrong.append(f"exit codes {codes}")
        if f"rank {case.rank} " not in error:
            outcome.wrong.append(f"said {error!r}")
    if "Traceback" in log:
        outcome.wrong.append(f"a traceback:\n{log[-3000:]}")
    if lost > CHECKPOINT_EVERY:
        outcome.wrong.append(f"{lost} steps lost")
    return outcome


def differences(run: Path, whole: Path) -> list[str]:
    """Return in what a run that went on is another one than the undisturbed."""
    found = []
    ours, theirs = losses(run), losses(whole)
    if ours != theirs:
        steps = [step for step in theirs if ours.get(step) != theirs[step]]
        found.append(f"other losses in steps {steps}: {ours} and {theirs}")
    if digest(run) != digest(whole):
        found.append("other masks")
    if rows(run, "validation") != rows(whole, "validation"):
        found.append("other evaluations")
    if summary(run)["test_accuracy"] != summary(whole)["test_accuracy"]:
        found.append("another test accuracy")
    return found


def run_all(
    folder: Path, kills: int, seed: int, jobs: int, say: Callable[[str], None]
) -> list[tuple[Case, Outcome]]:
    """Run cases until ``kills`` ranks were killed; one that had ended by then does not count."""
    generator, done = random.Random(seed), []
    kinds = [(ranks, stage) for ranks in RANKS for stage in STAGES]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        waiting = [pool.submit(run_whole, folder, *kind) for kind in kinds]
        seconds = dict(zip(kinds, [result.result() for result in waiting], strict=True))
        say(f"{len(kinds)} undisturbed runs took {min(seconds.values()):.1f} to "
            f"{max(seconds.values()):.1f} s each")  # fmt: skip
        while (missing := kills - sum(outcome.killed for _, outcome in done)) > 0:
            cases = [draw(generator, len(done) + number) for number in range(missing)]
            results = [
                pool.submit(
                    run_second if case.has_second else run_case,
                    folder,
                    case,
                    seconds[case.ranks, case.stage],
                )
                for case in cases
            ]
            for case, result in zip(cases, results, strict=True):
                try:
                    outcome = result.result()
                except Exception as error:  # the other cases still count
                    outcome = Outcome(True, [], 0.0, 0, 0, "", [repr(error)])
                done.append((case, outcome))
                say(line(case, outcome))
    return done


def line(case: Case, outcome: Outcome) -> str:
    """Return a case in one line, and more only of one that went wrong."""
    if not outcome.killed:
        text = f"{case}: had ended before the fault"
    elif case.has_second:
        text = f"{case}: refused in {outcome.ended_seconds:.1f} s; {outcome.error[:100]}"
    else:
        text = (
            f"{case}: after step {outcome.reached}; the others ended in "
            f"{outcome.ended_seconds:.1f} s, {outcome.lost} step(s) taken again; "
            f"{outcome.error[:100]}"
        )
    verdict = "NOT AS PROMISED: " + "; ".join(outcome.wrong) if outcome.wrong else "as promised"
    return f"{text} [{outcome.seconds:.0f} s] {verdict}"


def table(done: list[tuple[Case, Outcome]]) -> list[str]:
    """Return the summary: what was injected where, what was lost, how the others ended."""
    killed = [pair for pair in done if pair[1].killed and not pair[0].has_second]
    seconds = [pair for pair in done if pair[1].killed and pair[0].has_second]
    bad = [pair for pair in done if pair[1].wrong]
    lines = ["| killed in | kills | of rank 0 | steps taken again | others ended within |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for place in [*PLACES, ANY_TIME]:
        here = [pair for pair in killed if pair[0].place == place]
        if here:
            first = sum(case.rank == 0 for case, _ in here)
            lost = Counter(outcome.lost for _, outcome in here)
            spread = ", ".join(f"{count} × {steps}" for steps, count in sorted(lost.items()))
            slowest = max(outcome.ended_seconds for _, outcome in here)
            lines.append(f"| {place} | {len(here)} | {first} | {spread} | {slowest:.1f} s |")
    codes = Counter(
        code
        for case, outcome in killed
        for rank, code in enumerate(outcome.codes)
        if rank != case.rank
    )
    ranks = Counter(case.ranks for case, _ in killed)
    stages = Counter(case.stage for case, _ in killed)
    lines += [
        "",
        f"{len(done)} cases, {len(killed)} ranks killed; "
        + ", ".join(f"{count} of {n} ranks" for n, count in sorted(ranks.items()))
        + "; "
        + ", ".join(f"{count} at ZeRO {stage}" for stage, count in sorted(stages.items())),
        f"{len(seconds)} second starts on a run that trained, "
        f"{sum(case.place == ORPHANS for case, _ in seconds)} of them after its launcher was "
        f"killed; exit codes {dict(Counter(code for _, o in seconds for code in o.codes))}",
        f"exit codes of the others (3: another rank was lost): {dict(codes)}",
        f"steps taken again: {sum(outcome.lost for _, outcome in killed)} in all, at most "
        f"{max((outcome.lost for _, outcome in killed), default=0)} a kill; a checkpoint every "
        f"{CHECKPOINT_EVERY}",
        f"the others ended within "
        f"{max((outcome.ended_seconds for _, outcome in killed), default=0.0):.1f} s",
        f"{len(done) - len(bad)} as promised, {len(bad)} not",
    ]
    return lines


def versions() -> str:
    import deepspeed
    import torch

    return (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"DeepSpeed {deepspeed.__version__}, {len(os.sched_getaffinity(0))} cores"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="ranks to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, of 2 to 4 ranks each")
    parser.add_argument("--log", type=Path, help="file that gets what is printed")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)
        if options.log is not None:
            with options.log.open("a") as file:
                file.write(f"{text}\n")

    began = time.monotonic()
    preload()
    say(
        f"fault suite: {options.kills} kills, seed {options.seed}, {options.jobs} job(s); "
        f"{versions()}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        done = run_all(folder, options.kills, options.seed, options.jobs, say)
    for text in table(done):
        say(text)
    say(f"took {time.monotonic() - began:.0f} s")
    return 1 if any(outcome.wrong for _, outcome in done) else 0


if __name__ == "__main__":
    sys.exit(main())
