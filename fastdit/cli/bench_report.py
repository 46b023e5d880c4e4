"""``fastdit bench report``: results as a page or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..files import moved_when_complete
from . import options
from .errors import InputError, guarded
from .screen import Screen


@guarded
def report(
    results: Annotated[list[Path], typer.Argument(help="Files of rows that fastdit bench has written.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page (.html), or the tables alone (.md).")] = Path(
        "report.html"
    ),
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write results as one page that needs nothing else, with curves, heat maps and frames of the videos."""
    from .apart import check_apart
    from .video import check_target

    check_target(output, (".html", ".md"))
    check_apart([("--output", output)], [("the results", path) for path in results])
    if output.suffix.lower() == ".html":
        check_packages()
    page = write_report(results, output)
    Screen(quiet=quiet).note(f"wrote {page}")


def check_packages() -> None:
    """Check that a page can be written, before there is anything to write.

    Raises:
        InputError: A package is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"the report needs {' and '.join(missing)}; install fastdit[bench]")


def write_report(results: Sequence[Path], output: Path) -> Path:
    """Write a report, and return where it is.

    Args:
        results: Files of rows.
        output: A page, ``.html``, or Markdown, ``.md``.

    Raises:
        InputError: A file cannot be read, or there is nothing in them.
    """
    from ..bench.page import html, markdown
    from .bench_session import read

    rows = [row for path in results for row in read(path)]
    if not rows:
        raise InputError(f"there are no results in {', '.join(map(str, results))}")
    try:
        text = markdown(rows) if output.suffix.lower() == ".md" else html(rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"a row in {', '.join(map(str, results))} lacks what a report shows ({error!r}); is it of another version?"
        ) from error
    with moved_when_complete(output) as part:
        part.write_text(text, encoding="utf-8")
    return output
