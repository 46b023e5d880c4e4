"""One run of ``fastdit bench``: jobs are listed or done, rows are kept, changes and faults are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..generation.errors import InputError
from ..generation.processes import Team
from ..generation.video import check_target
from .console import FAILED, Screen, add_row, fail, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.jobs import Job
    from ..bench.report.result_store import Row

Build = Callable[["Session"], "list[Job]"]


@dataclass(frozen=True)
class Session:
    """Hold what all benchmarks are told.

    Args:
        output: File of rows.
        resume: Whether rows that are there are kept, and not measured again.
        against: File of rows that the new ones are compared with.
        dry_run: Whether only to say what would run.
        seed: Of everything that is random.
        device: Where it runs.
        dtype: Of weights and tensors, one of ``DTYPES`` of the models.
        screen: Shows progress and results.
        team: The processes that share the work.
        debug: Whether libraries may chatter.
    """

    output: Path
    resume: bool
    against: Path | None
    dry_run: bool
    seed: int
    device: str
    dtype: str
    screen: Screen
    team: Team
    debug: bool = False

    def run(self, build: Build) -> None:
        """Do the jobs, or say what they are.

        Args:
            build: Makes the jobs; nothing is computed by it.

        Raises:
            InputError: The file of rows is there already, cannot be written or is of another run, or the other file
                cannot be read or is empty.
            Exit: A result was wrong, with code 1.
        """
        from ..bench.report.result_store import Store, environment, other_run
        from ..generation.loading import choose_dtype

        check_target(self.output, None)
        if self.output.exists() and not self.resume and not self.dry_run:
            raise InputError(
                f"{self.output} is there already; go on with it by --resume, or name another with --output"
            )
        old = None if self.against is None else read(self.against)
        if old == []:
            raise InputError(f"there are no results in {self.against} to compare with")
        store, about = Store(self.output), environment(self.device, self.seed, choose_dtype(self.dtype, self.device))
        other = other_run(self.rows(), about)
        if other is not None:
            raise InputError(
                f"{self.output} has rows of another run: {other}; go on with the same --seed, --dtype and --device, "
                "or name another file with --output"
            )
        with self.screen.working(), self._quiet():
            jobs = build(self)
            if not self.dry_run:
                faults = self._work(jobs, store, about)
        if self.dry_run:
            rows = self.rows()
            self.screen.result({"jobs": [_plain(job, rows) for job in jobs]}, plan_table(jobs, rows))
            return
        found = self.team.gather([{"faults": faults}])
        if not self.team.is_first:
            return
        names = {(job.benchmark, job.name) for job in jobs}
        rows = read(self.output) if self.output.exists() else []
        self._show([row for row in rows if (row["benchmark"], row["job"]) in names], old)
        faults = {name: text for each in found for name, text in each["faults"].items()}
        if faults:
            for name, text in faults.items():
                self.screen.note(f"wrong: {name}: {text}")
            raise typer.Exit(fail(f"{len(faults)} results were wrong and have no row", FAILED))

    def rows(self) -> list[Row]:
        """Return the rows of earlier runs, if there is one that goes on."""
        return read(self.output) if self.resume and self.output.exists() else []

    def _quiet(self) -> Any:
        import contextlib

        from ..generation.loading import quiet_libraries

        return contextlib.nullcontext() if self.debug else quiet_libraries()

    def _work(self, jobs: list[Job], store: Any, about: dict[str, Any]) -> dict[str, str]:
        from ..bench.jobs import run_job

        faults: dict[str, str] = {}
        mine: list[Job] = self.team.share(jobs)
        try:
            for number, job in enumerate(mine, 1):
                self.screen.clear()
                what = job.name if len(job.parts) > 1 else ", ".join((*job.parts, job.name))
                bar = self.screen.start(f"{job.benchmark} {number}/{len(mine)}: {what[:60]}", job.steps)
                faults |= run_job(job, store, about, bar.advance)
                bar.finish()
        except BaseException:
            if store.path.exists():
                self.screen.note(f"what is done is in {store.path}; the same command with --resume goes on from there")
            raise
        return faults

    def _show(self, rows: list[Row], old: list[Row] | None) -> None:
        from ..bench.report.columns import changes, compared

        value: dict[str, Any] = {"rows": rows}
        tables = result_tables(rows)
        if old is not None:
            value |= {"changes": changes(old, rows), "compared": len(compared(old, rows))}
            tables.append(_changes_table(value["changes"], value["compared"], str(self.against)))
        self.screen.note(f"rows are in {self.output}")
        self.screen.result(value, *tables)


def read(path: Path) -> list[Row]:
    """Read a file of rows.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    from ..bench.report.result_store import read_rows

    try:
        return read_rows(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read results from {path}: {error}") from error


def plan_table(jobs: Sequence[Job], rows: Sequence[Row]) -> Table:
    """Show what would run.

    Args:
        jobs: The jobs.
        rows: Rows that are there already.
    """
    table = plain_table("what would run", "benchmark", "job", "measurements", "about", numbers=False)
    total = 0.0
    by_name: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        by_name.setdefault((job.benchmark, job.name), []).append(job)
    for (benchmark, name), group in by_name.items():
        todo = [(len(missing), job.seconds or 0.0) for job in group if (missing := job.missing(rows))]
        seconds = sum(each for _, each in todo)
        total += seconds
        about = "?" if group[0].seconds is None else _spell(seconds)
        add_row(table, benchmark, name, str(sum(count for count, _ in todo)), about)
    unknown = any(job.seconds is None for job in jobs)
    table.caption = f"in all about {_spell(total)}" + (", without those that nobody knows" if unknown else "")
    table.caption_justify = "left"
    return table


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """Show rows, one table for each benchmark, and what could not run.

    Args:
        rows: The rows.
    """
    from ..bench.report.page import tables as parts_of
    from ..bench.report.result_store import absent

    tables = []
    for part in parts_of(rows):
        for group in part["groups"]:
            table = plain_table(f"{part['title']}: {group['name']}", *group["head"])
            for cells in group["body"]:
                add_row(table, *cells)
            tables.append(table)
        if part["winners"]:
            tables[-1].caption, tables[-1].caption_justify = "\n".join(part["winners"]), "left"
    missing = absent(rows)
    if missing:
        table = plain_table("not here", "what", "why", numbers=False)
        for part, reason in missing:
            add_row(table, part, reason)
        tables.append(table)
    return tables


def _changes_table(changes: Sequence[dict[str, Any]], count: int, name: str) -> Table:
    title = f"{'' if changes else 'nothing '}changed beyond noise against {name}: {count} rows compared"
    title = title if count else f"nothing to compare: none of these rows is in {name}"
    table = plain_table(title, "benchmark", "job", "what", "number", "before", "now", "", numbers=False)
    for each in changes:
        cells = (each[name] for name in ("benchmark", "job", "part", "column", "old", "new"))
        add_row(table, *cells, "better" if each["better"] else "worse")
    return table


def _plain(job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    return {"benchmark": job.benchmark, "job": job.name, "parts": job.missing(rows), "seconds": job.seconds}


def _spell(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
