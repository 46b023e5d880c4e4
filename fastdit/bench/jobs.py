"""Benchmark jobs: finished parts are skipped, results are kept, and faulty ones are not written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .report.result_store import Row, Store, key, latest


@dataclass
class Outcome:
    """What a job measured.

    Args:
        rows: Measurements by part.
        absent: Parts that cannot run here, with the reason.
        faults: Parts whose result was wrong, with what was wrong; they get no row.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Several things that are measured side by side.

    Args:
        benchmark: Which benchmark it belongs to.
        name: Its name, unique in the benchmark.
        parts: What it measures; there is a row for each.
        run: Measures at least the parts that are asked for. It may call the function it is given after each step.
        seconds: Estimated seconds; ``None`` if unknown.
        about: What all of its rows say.
        steps: How many steps it has, at least 1.
    """

    benchmark: str
    name: str
    parts: tuple[str, ...]
    run: Callable[[Collection[str], Callable[[], None]], Outcome]
    seconds: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    steps: int = 1

    def missing(self, rows: Sequence[Row]) -> list[str]:
        """Return the parts without a measurement in rows; parts that were absent then are tried again.

        Args:
            rows: Rows of earlier runs.
        """
        mine = [row for row in rows if (row["benchmark"], row["job"]) == (self.benchmark, self.name)]
        done = {row["part"] for row in mine if "absent" not in row}
        return [part for part in self.parts if part not in done]


def run_job(job: Job, store: Store, run: dict[str, Any], advance: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Run the missing parts of a job and write their rows; return the faults by part.

    Args:
        job: The job.
        store: Where rows are.
        run: What rows say of the run.
        advance: Called after each step.
    """
    known = store.read()
    todo = job.missing(known)
    if not todo:
        return {}
    outcome = job.run(todo, advance)
    head = {"benchmark": job.benchmark, "job": job.name}
    found = {**outcome.rows, **{part: {"absent": reason} for part, reason in outcome.absent.items()}}
    rows = [{**head, "part": p, **job.about, **found[p], "run": run} for p in job.parts if p in todo and p in found]
    said = {(*key(row), row["absent"]) for row in latest(known) if "absent" in row}
    store.add([row for row in rows if "absent" not in row or (*key(row), row["absent"]) not in said])
    return {f"{job.name}, {part}": fault for part, fault in outcome.faults.items() if part in todo}
