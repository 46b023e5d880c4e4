"""The command line: one module per command; nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .compare import compare
from .console import INTERRUPTED, fail
from .generate import generate
from .info import info
from .inspect import inspect
from .search import search

app = typer.Typer(
    name="fastdit",
    help="Sparse attention for video diffusion transformers: make videos, search plans, run benchmarks.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(compare)
app.command()(search)
app.command()(inspect)
app.command()(info)
app.add_typer(bench)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastdit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _stop(number: int, frame: object) -> None:
    # leaving through an exception lets unfinished files be removed
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes are 0 for success, 1 for a failure, 2 for bad input, 130 for Ctrl-C and 143 for termination.

    Args:
        arguments: Arguments after ``fastdit``; default ``sys.argv[1:]``.

    Raises:
        SystemExit: Always.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a table with a letter that the terminal lacks is shown all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="fastdit", standalone_mode=False)
    except KeyboardInterrupt:
        code = fail("interrupted", INTERRUPTED)
    except Exception as error:
        # typer's own usage errors; older releases take the class from click, newer ones bring their own
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        code = fail(f"{explain().replace('Value error, ', '')} (see fastdit --help)", getattr(error, "exit_code", 2))
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    sys.exit(code if isinstance(code, int) else 0)
