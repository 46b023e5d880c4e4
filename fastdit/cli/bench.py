"""``fastdit bench``: how fast and how good, always beside dense attention of the same run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import moved_when_complete
from ..generation.errors import InputError
from . import options
from .assemble import assembled
from .bench_session import Session
from .console import Screen, guarded

bench = typer.Typer(
    name="bench",
    help="Measure speed and quality, always beside dense attention of the same run, and report them.",
    no_args_is_help=True,
)


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
    from ..generation.video import check_target
    from .apart import check_apart

    check_target(output, (".html", ".md"))
    check_apart([("--output", output)], [("the results", path) for path in results])
    if output.suffix.lower() == ".html":
        check_packages()
    page = write_report(results, output)
    Screen(quiet=quiet).note(f"wrote {page}")


bench.command()(report)


def _prompt(text: str | None) -> str | None:
    from ..generation.errors import InputError
    from ..generation.jobs import read_prompts

    try:
        return None if text is None else read_prompts(text, None)[0]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


Prompt = Annotated[str | None, typer.Option(callback=_prompt, help="What the pipeline makes.", show_default=False)]


@bench.command()
@guarded
@assembled(session=partial(options.open_session, output=Path("bench-kernels.jsonl")))
def kernels(
    *,
    problems: Annotated[str, typer.Option(help="Models and sizes, or own ones as 8x16x16/4x64.")] = "demo",
    densities: options.Densities = "0.1,0.2,0.5",
    blocks: Annotated[str, typer.Option(help="Queries and keys in a block.")] = "64x64",
    contenders: Annotated[
        str | None, typer.Option(help="Only these, as in sdpa-flash,fastdit-cpu.", show_default=False)
    ] = None,
    repeats: options.Repeats = 5,
    session: Session,
) -> None:
    """Time attention kernels over the same blocks: ours and all that are installed, each checked first."""
    from ..bench.suites import build_kernels

    only = None if contenders is None else options.split(contenders)
    sizes, wanted = options.read_blocks(blocks), options.read_densities(densities)
    session.run(lambda s: build_kernels(s, options.split(problems), wanted, sizes, repeats, only))


@bench.command()
@guarded
@assembled(session=partial(options.open_session, output=Path("bench-methods.jsonl")), size=options.read_size)
def methods(
    *,
    problems: Annotated[str, typer.Option(help="Sizes of the calls that are made up; empty for none.")] = "demo",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also capture calls of this pipeline: demo, a folder, or a hub id."),
    ] = None,
    prompt: Prompt = None,
    settings: options.Settings = None,
    means: options.Means = False,
    densities: options.Densities = "0.1,0.2,0.3",
    size: dict[str, Any],
    session: Session,
) -> None:
    """Measure on single attention calls how near methods come to dense attention, at equal realised density."""
    from ..bench.model import Model
    from ..bench.suites import build_methods

    found = None if model is None else Model.find(model, size)
    chosen, wanted = options.read_settings(settings, means=means), options.read_densities(densities)
    options.check_files(session, chosen, found)
    session.run(lambda s: build_methods(s, options.split(problems), chosen, wanted, found, prompt))


@bench.command()
@guarded
@assembled(
    session=partial(options.open_session, output=Path("bench-quality.jsonl")),
    schedule=options.read_steps,
    size=options.read_size,
)
def quality(
    *,
    model: options.Model = "demo",
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line (default: the demo's).", show_default=False)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            callback=options.COUNT,
            help="How many prompts (default: all of a file, 4 of the demo's).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(callback=options.COUNT, help="Seeds of each.")] = 1,
    settings: options.Settings = None,
    means: options.Means = False,
    densities: options.Densities = "0.2,0.35",
    videos: Annotated[
        Path | None, typer.Option(help="Folder for videos (default: beside the results).", show_default=False)
    ] = None,
    score_with: Annotated[
        str | None,
        typer.Option(help="Command for each folder of videos, as in 'vbench evaluate --videos_path {folder} ...'."),
    ] = None,
    schedule: dict[str, Any],
    size: dict[str, Any],
    session: Session,
) -> None:
    """Make videos with each method beside dense ones of the same prompt and seed, at equal realised density.

    Under accelerate launch or torchrun the videos are divided among the processes.
    """
    from ..bench.model import Model
    from ..bench.suites import build_quality
    from ..generation.jobs import read_prompts
    from ..generation.video import check_ffmpeg

    check_ffmpeg()
    check_command(score_with)
    texts = None if prompts is None else read_prompts(None, prompts)
    found = Model.find(model, size)
    known = found.prompts(texts, "some with --prompts FILE, one a line")
    count = 4 if count is None and texts is None else count
    chosen, wanted = options.read_settings(settings, means=means, schedule=schedule), options.read_densities(densities)
    folder = session.output.with_suffix(".videos") if videos is None else videos
    options.check_files(session, chosen, found, prompts=prompts, videos=folder)
    session.run(lambda s: build_quality(s, found, known, count, seeds, chosen, wanted, folder))
    if score_with is not None and not session.dry_run and session.team.is_first:
        score_folders(score_with, folder, session.screen)
    session.team.close()


@bench.command()
@guarded
@assembled(session=partial(options.open_session, output=Path("bench-e2e.jsonl")), size=options.read_size)
def e2e(
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, a folder, or a hub id; default: demo.")
    ] = None,
    problems: Annotated[
        str, typer.Option(help="Real configurations that get random weights, as in wan-1.3b-480p.")
    ] = "",
    prompt: Prompt = None,
    settings: options.Settings = "default",
    means: options.Means = False,
    densities: options.MaybeDensities = None,
    repeats: options.Repeats = 3,
    size: dict[str, Any],
    session: Session,
) -> None:
    """Time whole videos, dense and sparse in turn, beside what the share of attention predicts."""
    from ..bench.model import Model
    from ..bench.suites import build_e2e

    name = "demo" if model is None and not problems else model
    found = None if name is None else Model.find(name, size)
    chosen = options.read_settings(settings, means=means)
    wanted = [] if densities is None else options.read_densities(densities)
    listed = options.split(problems)
    options.check_files(session, chosen, found)
    session.run(lambda s: build_e2e(s, chosen, wanted, repeats, found, listed, prompt=prompt))


@bench.command("all")
@guarded
@assembled(session=partial(options.open_session, output=Path("bench.jsonl")))
def everything(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few videos: minutes on two cores.")] = False,
    session: Session,
) -> None:
    """Run all four benchmarks on the demo and on calls that are made up, and write the report beside the results."""
    from ..bench.suites import build_everything
    from ..generation.video import check_ffmpeg

    check_ffmpeg()
    check_packages()
    page = session.output.with_suffix(".html")
    options.check_files(session, videos=session.output.with_suffix(".videos"), page=page)
    session.run(lambda s: build_everything(s, quick=quick))
    if not session.dry_run and session.team.is_first:
        session.screen.note(f"the report is {write_report([session.output], page)}")
    session.team.close()


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
    from ..bench.report.page import html, markdown
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


def check_command(command: str | None) -> None:
    """Check that a command can be run for a folder.

    Args:
        command: As the user wrote it; ``None`` for none.

    Raises:
        InputError: There is no such program, or the command does not say where the folder goes.
    """
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--score-with cannot be read as a command ({error}), got {command!r}") from error
    if not any("{folder}" in word for word in words):
        raise InputError("--score-with has no {folder}; write it where the folder of videos belongs")
    if shutil.which(words[0]) is None:
        raise InputError(f"--score-with: there is no program {words[0]!r} here")


def score_folders(command: str, videos: Path, screen: Screen) -> None:
    """Run a command on the videos of each setting and of dense attention; what it prints goes to ``scores.txt`` there.

    Args:
        command: With ``{folder}`` where the folder belongs.
        videos: Where the folders are.
        screen: Shows where the scores are.

    Raises:
        InputError: The command failed.
    """
    for folder in sorted(path for path in videos.glob("*") if path.is_dir() and path.name != "side-by-side"):
        words = [word.replace("{folder}", str(folder)) for word in shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{shlex.join(words)} failed with {done.returncode}: {done.stderr.strip()[-300:]}")
        with moved_when_complete(folder / "scores.txt") as part:
            part.write_text(done.stdout, encoding="utf-8")
        screen.note(f"scores of {folder.name} are in {folder / 'scores.txt'}")
