"""Progress, results and errors on a terminal."""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..generation.errors import InputError

NOT_MEASURED = "-"

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class _Count(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        """Show how many parts are done, where there is more than one."""
        return super().render(task) if task.total and task.total > 1 else Text("")


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Show the time that is left, once steps say how long one takes."""
        return Text("") if task.finished or not task.time_remaining else super().render(task).append(" left")


class Bar:
    """The progress of one part of the work: a bar on a terminal, elsewhere a line when it is done.

    Args:
        screen: Where it is shown.
        name: What is being done.
        total: Parts, or ``None`` if that is unknown.
    """

    def __init__(self, screen: Screen, name: str, total: int | None) -> None:
        self._screen = screen
        self._name = name
        self._task = screen.progress.add_task(name, total=total)

    def advance(self) -> None:
        """Move on by one part."""
        self._screen.progress.advance(self._task)

    def move(self, done: int, total: int) -> None:
        """Show how much is done, where that and the total are estimates.

        Args:
            done: Parts that are done.
            total: Parts in all.
        """
        self._screen.progress.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """Show that all is done."""
        progress = self._screen.progress
        task = next(task for task in progress.tasks if task.id == self._task)
        total = task.total or 1
        progress.update(self._task, total=total, completed=total)
        progress.stop_task(self._task)
        if progress.disable:
            self._screen.note(f"{self._name} took {task.elapsed or 0:.1f} s")


class Screen:
    """Progress, warnings and results on a terminal.

    Args:
        quiet: Show only errors.
        as_json: Write results as JSON; nothing else goes to stdout.
        shown: False in all processes but the first.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, shown: bool = True) -> None:
        self.quiet = quiet or not shown
        self.as_json = as_json
        self.shown = shown
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description:<11}"),
            BarColumn(bar_width=30),
            _Count(),
            TimeElapsedColumn(),
            _Left(compact=True),
            console=console,
            disable=self.quiet or not console.is_terminal,
            refresh_per_second=4,
            speed_estimate_period=math.inf,  # one step may take minutes
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Draw progress while the work is done; what libraries print goes to stderr."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = self._warn
            stack.enter_context(redirect_stdout(sys.stderr))
            stack.enter_context(self.progress)
            yield

    def start(self, name: str, total: int | None = None) -> Bar:
        """Show a bar for one part of the work.

        Args:
            name: What is being done.
            total: Parts, or ``None`` if that is unknown.
        """
        return Bar(self, name, total)

    @contextmanager
    def stages(self, names: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
        """Give a function that shows how far the work is: called with a stage, parts done, and parts in all.

        Args:
            names: What is shown of each stage, which has a bar of its own.
        """
        bars: dict[str, Bar] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                finish()
                bars[stage] = self.start(names[stage], total)
            bars[stage].move(done, total)

        def finish() -> None:
            while bars:
                bars.popitem()[1].finish()

        yield show
        finish()

    def clear(self) -> None:
        """Remove finished progress bars."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)

    def note(self, text: str) -> None:
        """Show a line above the bars.

        Args:
            text: The line.
        """
        if not self.quiet:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def result(self, value: dict[str, Any], *tables: Table) -> None:
        """Show the result of a command on stdout: as JSON, as tables, or not at all.

        Args:
            value: The result.
            *tables: The result for people.
        """
        if not self.shown:
            return
        if self.as_json:
            typer.echo(json_text(value, sys.stdout.encoding))
        elif not self.quiet:
            console = Console()
            for table in tables:
                console.print(table)

    def _warn(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, (UserWarning, RuntimeWarning)):
            self.note(f"warning: {' '.join(str(message).split())}")


def json_text(value: Any, encoding: str | None = None) -> str:
    """Return JSON for people to read, with escapes where letters cannot be written.

    Args:
        value: What JSON can hold.
        encoding: Of the file; ``None`` is UTF-8.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=2, allow_nan=False)
    return text


def plain_table(title: str, *columns: str, numbers: bool = True, caption: str | None = None) -> Table:
    """Make a table.

    Args:
        title: Above the table.
        *columns: Headings.
        numbers: Whether all columns but the first hold numbers, which are aligned on the right.
        caption: Below the table.
    """
    below = None if caption is None else Text(caption)
    left: Any = {"title_justify": "left", "caption_justify": "left", "title_style": "bold", "header_style": "bold"}
    table = Table(title=Text(title), caption=below, **left)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and i else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str, end_section: bool = False) -> None:
    """Add a row of plain text, in which square brackets mean nothing.

    Args:
        table: The table.
        *cells: One for each column.
        end_section: Whether a line is drawn below.
    """
    table.add_row(*map(Text, cells), end_section=end_section)


def number(value: float | str | None, form: str = "{:.2f}") -> str:
    """Write a number for a table.

    Args:
        value: The number, a text that stands for itself, or ``None`` where nothing was measured.
        form: How a number is written.
    """
    if value is None:
        return NOT_MEASURED
    return value if isinstance(value, str) else form.format(value)


def fail(message: str, code: int) -> int:
    """Write one line to stderr and return the exit code.

    Args:
        message: What was wrong; line breaks become spaces.
        code: The exit code.
    """
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(message.split()), err=True)
    return code


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command end with one line instead of a traceback, unless it was given ``debug=True``.

    Args:
        command: The command; it has a keyword ``debug``.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            _end(error, "interrupted; no half-written file was left behind", INTERRUPTED, debug)
        except InputError as error:
            _end(error, str(error), BAD_INPUT, debug)
        except Exception as error:  # noqa: BLE001 - the last resort, whatever went wrong
            hint = "" if debug else " (--debug shows where)"
            _end(error, f"{type(error).__name__}: {error}{_advice(error)}{hint}", FAILED, debug)

    return run


def _end(error: BaseException, message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    raise typer.Exit(fail(message, code)) from None


def _advice(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "; try fewer --frames, a smaller --height and --width, --dtype bfloat16 or --offload"
    return ""
