"""One run of ``fastdit bench``: jobs are listed or done, rows are kept, changes and faults are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generation.errors import InputError
from ..generation.processes import Team
from ..generation.video import check_folder, check_name, check_target
from .apart import check_apart, plan_files
from .console import FAILED, Screen, add_row, fail, plain_table
from .options import OUTPUT, DeviceOptions, OutputOptions, Seed, option

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.conditions import Conditions
    from ..bench.inputs.settings import Setting
    from ..bench.jobs import Job
    from ..bench.model import Model
    from ..bench.report.result_store import Row


@dataclass(frozen=True)
class Session:
    """One run of benchmarks, as all of them are asked for.

    Args:
        seed: Random seed.
        machine: Where it runs.
        out: What it shows.
    """

    output: Annotated[Path, option("JSON lines file, one line per measurement.", "--output", "-o", panel=OUTPUT)]
    resume: Annotated[bool, option("Keep the rows of the file and measure the rest.", "--resume", panel=OUTPUT)] = False
    against: Annotated[Path | None, option("Results of an earlier run: report changes beyond noise.", panel=OUTPUT)] = (
        None
    )
    dry_run: Annotated[bool, option("List the jobs and their estimated time.", "--dry-run", panel=OUTPUT)] = False
    seed: Seed = 0
    machine: DeviceOptions = DeviceOptions()
    out: OutputOptions = OutputOptions()

    @property
    def team(self) -> Team:
        """Return the processes that share the work."""
        return self.machine.team

    @cached_property
    def screen(self) -> Screen:
        """Return the screen of this run."""
        return self.out.screen(shown=self.team.is_first)

    @property
    def reports(self) -> bool:
        """Return whether this process has results to report: it is the first one, and not of a dry run."""
        return self.team.is_first and not self.dry_run

    def check_files(
        self,
        settings: Sequence[Setting] = (),
        model: Model | None = None,
        *,
        prompts: Path | None = None,
        videos: Path | None = None,
        page: Path | None = None,
    ) -> None:
        """Check that no file is overwritten that is read, written elsewhere or of another run.

        Args:
            settings: The settings, of which some are plans.
            model: The pipeline.
            prompts: File of prompts.
            videos: Folder of videos.
            page: File of the report.

        Raises:
            InputError: One would be overwritten, or the folder cannot be written.
        """
        read = [("--prompts", prompts)]
        for setting in settings:
            read += plan_files(Path(setting.fields["path"]), "--settings") if setting.method == "plan" else ()
        read += [] if model is None else [("--model", file) for file in model.source.files()]
        new = [("--videos", videos), ("the report", page)]
        check_apart([("--output", self.output), *new], read)
        check_apart(new, [("--against", self.against)])  # rows may be added to those that they are compared with
        if videos is not None:
            check_folder(next(place for place in (videos, *videos.parents) if place.exists()), option="--videos")
        for path in filter(None, (videos, page)):
            check_name(path)
            if path.exists() and (path.is_file() or any(path.iterdir())):
                self._check_new(path)

    def run(self, build: Callable[[Conditions], list[Job]]) -> None:
        """Do the jobs, or list them.

        Args:
            build: Makes the jobs; nothing is computed by it.

        Raises:
            InputError: The file of rows exists already, cannot be written or is of another run, or the other file
                cannot be read or is empty.
            Exit: A result was wrong, with code 1.
        """
        from ..bench.conditions import Conditions
        from ..bench.report.result_store import Store, environment, other_run

        check_target(self.output, None)
        if self.output.exists():
            self._check_new(self.output)
        old = None if self.against is None else read(self.against)
        if old == []:
            raise InputError(f"{self.against} has no results to compare with")
        earlier = self._rows()
        given = Conditions(self.output, self.seed, self.machine.device, self.machine.weights, earlier)
        store, about = Store(self.output), environment(given.device, given.seed, given.dtype)
        other = other_run(earlier, about)
        if other is not None:
            raise InputError(
                f"{self.output} has rows of another run: {other}; pass the same --seed, --dtype and --device, "
                "or name another file with --output"
            )
        with self.screen.working(), self.out.quiet_libraries():
            jobs = build(given)
            faults = {} if self.dry_run else self._work(jobs, store, about)
        if self.dry_run:
            rows = self._rows()
            self.screen.result({"jobs": [_plain(job, rows) for job in jobs]}, plan_table(jobs, rows))
            return
        found = self.team.gather([{"faults": faults}])
        if self.team.is_first:
            self._report(jobs, old, {name: text for each in found for name, text in each["faults"].items()})

    def _check_new(self, path: Path) -> None:
        if not self.resume and not self.dry_run:
            raise InputError(f"{path} already exists; pass --resume to continue, or name another with --output")

    def _rows(self) -> list[Row]:
        return read(self.output) if self.resume and self.output.exists() else []

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
                self.screen.note(f"the rows so far are in {store.path}; run the same command with --resume to continue")
            raise
        return faults

    def _report(self, jobs: list[Job], old: list[Row] | None, faults: dict[str, str]) -> None:
        from ..bench.report.columns import changes, compared

        names = {(job.benchmark, job.name) for job in jobs}
        rows = read(self.output) if self.output.exists() else []
        rows = [row for row in rows if (row["benchmark"], row["job"]) in names]
        value: dict[str, Any] = {"rows": rows}
        tables = result_tables(rows)
        if old is not None:
            value |= {"changes": changes(old, rows), "compared": len(compared(old, rows))}
            tables.append(_changes_table(value["changes"], value["compared"], str(self.against)))
        self.screen.note(f"rows are in {self.output}")
        self.screen.result(value, *tables)
        for name, text in faults.items():
            self.screen.note(f"wrong: {name}: {text}")
        if faults:
            raise typer.Exit(fail(f"{len(faults)} results were wrong and have no row", FAILED))


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
    """List what would run.

    Args:
        jobs: The jobs.
        rows: Rows of earlier runs.
    """
    table = plain_table("jobs", "benchmark", "job", "measurements", "estimate", numbers=False)
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
    table.caption = f"total: about {_spell(total)}" + (" and the jobs without an estimate" if unknown else "")
    return table


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """Make the tables of rows, one for each benchmark, and one of what could not run.

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
            tables[-1].caption = "\n".join(part["winners"])
    missing = absent(rows)
    if missing:
        table = plain_table("not available", "what", "reason", numbers=False)
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
