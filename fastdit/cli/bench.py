"""``fastdit bench``: how fast and how good, always beside dense attention of the same run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import moved_when_complete
from ..generation.errors import InputError, as_input_error
from ..generation.jobs import read_prompts
from .apart import check_apart
from .assemble import command
from .bench_session import Session, read
from .console import Screen
from .options import (
    ATTENTION,
    COUNT,
    OUTPUT,
    Densities,
    Model,
    OutputOptions,
    ScheduleOptions,
    SizeOptions,
    option,
)
from .settings import read_blocks, read_densities, split

if TYPE_CHECKING:
    from ..bench.inputs.settings import Setting

bench = typer.Typer(
    name="bench",
    help="Measure speed and quality, always beside dense attention of the same run, and report them.",
    no_args_is_help=True,
)

Repeats = Annotated[int, option("Number of rounds after the warm-up.", callback=COUNT)]


def _prompt(text: str | None) -> str | None:
    try:
        return None if text is None else read_prompts(text, None)[0]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


Prompt = Annotated[str | None, option("Prompt of the videos.", callback=_prompt)]


@dataclass(frozen=True)
class SettingOptions:
    """Which methods and plans are compared."""

    settings: Annotated[
        str | None,
        option("Methods or plans, as in default,sla(density=0.1),plan.json (default: all).", panel=ATTENTION),
    ] = None
    means: Annotated[
        bool, option("Also run each method with mean compensation of the skipped blocks.", "--means", panel=ATTENTION)
    ] = False

    def read(self, **schedule: Any) -> list[Setting]:
        """Find the settings.

        Args:
            **schedule: Fields of ``Schedule`` that all of them get.
        """
        from ..bench.inputs.settings import find_settings
        from ..search.candidates import split_candidates

        with as_input_error():
            known = find_settings(None if self.settings is None else split_candidates(self.settings), means=self.means)
            return [setting.changed(**schedule) for setting in known]


@bench.command()
@command
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of fastdit bench.")],
    output: Annotated[
        Path, option("Page (.html) with figures, or tables only (.md).", "--output", "-o", panel=OUTPUT)
    ] = Path("report.html"),
    *,
    out: OutputOptions,
) -> None:
    """Write a self-contained page of results, with curves, heat maps and frames of the videos."""
    from ..generation.video import check_target

    check_target(output, (".html", ".md"))
    check_apart([("--output", output)], [("the results", path) for path in results])
    if output.suffix.lower() == ".html":
        check_packages()
    page = write_report(results, output)
    out.screen().note(f"wrote {page}")


@bench.command()
@command
def kernels(
    *,
    problems: Annotated[str, option("Models and sizes, or your own size as in 8x16x16/4x64.")] = "demo",
    densities: Densities = "0.1,0.2,0.5",
    blocks: Annotated[str, option("Queries and keys per block.")] = "64x64",
    contenders: Annotated[str | None, option("Kernels, as in sdpa-flash,fastdit-cpu (default: all).")] = None,
    repeats: Repeats = 5,
    session: Session = Session(Path("bench-kernels.jsonl")),
) -> None:
    """Time fastdit's kernels and all others that are installed on the same blocks, after checking each one's output."""
    from ..bench.suites import build_kernels

    only = None if contenders is None else split(contenders)
    sizes, wanted = read_blocks(blocks), read_densities(densities)
    session.run(lambda s: build_kernels(s, split(problems), wanted, sizes, repeats, only))


@bench.command()
@command
def methods(
    *,
    problems: Annotated[str, option("Sizes of the synthetic calls; empty for none.")] = "demo",
    model: Annotated[
        str | None, option("Also capture calls of this pipeline: demo, a folder, or a hub id.", "--model", "-m")
    ] = None,
    prompt: Prompt = None,
    compared: SettingOptions,
    densities: Densities = "0.1,0.2,0.3",
    size: SizeOptions,
    session: Session = Session(Path("bench-methods.jsonl")),
) -> None:
    """Measure the error of each method against dense attention on single calls, at equal realised density."""
    from ..bench.model import Model
    from ..bench.suites import build_methods

    pipeline = None if model is None else Model.find(model, size.arguments())
    settings, wanted = compared.read(), read_densities(densities)
    session.check_files(settings, pipeline)
    session.run(lambda s: build_methods(s, split(problems), settings, wanted, pipeline, prompt))


@bench.command()
@command
def quality(
    *,
    model: Model = "demo",
    prompts: Annotated[Path | None, option("Text file with one prompt per line (default: the demo's prompts).")] = None,
    count: Annotated[
        int | None,
        option("Number of prompts (default: all of a file, 4 of the demo's).", callback=COUNT),
    ] = None,
    seeds: Annotated[int, option("Number of seeds per prompt.", callback=COUNT)] = 1,
    compared: SettingOptions,
    densities: Densities = "0.2,0.35",
    videos: Annotated[Path | None, option("Folder for the videos (default: beside the results).")] = None,
    score_with: Annotated[
        str | None,
        option("Command to run on each folder of videos, as in 'vbench evaluate --videos_path {folder} ...'."),
    ] = None,
    schedule: ScheduleOptions,
    size: SizeOptions,
    session: Session = Session(Path("bench-quality.jsonl")),
) -> None:
    """Compare the videos of each method with dense ones of the same prompt and seed, at equal realised density.

    Under accelerate launch or torchrun the videos are divided among the processes.
    """
    from ..bench.model import Model
    from ..bench.suites import build_quality
    from ..generation.video import check_ffmpeg

    check_ffmpeg()
    check_command(score_with)
    texts = None if prompts is None else read_prompts(None, prompts)
    pipeline = Model.find(model, size.arguments())
    known = pipeline.prompts(texts, "some with --prompts FILE, one per line")
    count = 4 if count is None and texts is None else count
    settings, wanted = compared.read(**schedule.read()), read_densities(densities)
    folder = session.output.with_suffix(".videos") if videos is None else videos
    session.check_files(settings, pipeline, prompts=prompts, videos=folder)
    session.run(lambda s: build_quality(s, pipeline, known, count, seeds, settings, wanted, folder))
    if score_with is not None and session.reports:
        score_folders(score_with, folder, session.screen)
    session.team.close()


@bench.command()
@command
def e2e(
    *,
    model: Annotated[str | None, option("demo, a folder, or a hub id (default: demo).", "--model", "-m")] = None,
    problems: Annotated[str, option("Full-size configurations with random weights, as in wan-1.3b-480p.")] = "",
    prompt: Prompt = None,
    compared: SettingOptions = SettingOptions("default"),
    densities: Annotated[
        str | None,
        option(
            "Fractions of the pairs to compute, as in 0.1,0.2 (default: each setting's own density).",
            panel=ATTENTION,
        ),
    ] = None,
    repeats: Repeats = 3,
    size: SizeOptions,
    session: Session = Session(Path("bench-e2e.jsonl")),
) -> None:
    """Time whole videos, dense and sparse in turn, beside the speedup predicted from the share of attention."""
    from ..bench.model import Model
    from ..bench.suites import build_e2e

    name = "demo" if model is None and not problems else model
    pipeline = None if name is None else Model.find(name, size.arguments())
    settings = compared.read()
    wanted = [] if densities is None else read_densities(densities)
    session.check_files(settings, pipeline)
    session.run(lambda s: build_e2e(s, settings, wanted, repeats, pipeline, split(problems), prompt=prompt))


@bench.command("all")
@command
def everything(
    *,
    quick: Annotated[bool, option("Use small sizes and few videos: minutes on two cores.", "--quick")] = False,
    session: Session = Session(Path("bench.jsonl")),
) -> None:
    """Run all four benchmarks on the demo model and synthetic calls, and write the report beside the results."""
    from ..bench.suites import build_everything
    from ..generation.video import check_ffmpeg

    check_ffmpeg()
    check_packages()
    page = session.output.with_suffix(".html")
    session.check_files(videos=session.output.with_suffix(".videos"), page=page)
    session.run(lambda s: build_everything(s, quick=quick))
    if session.reports:
        session.screen.note(f"the report is {write_report([session.output], page)}")
    session.team.close()


def check_packages() -> None:
    """Check that the packages of a report are installed.

    Raises:
        InputError: A package is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"the report needs {' and '.join(missing)}; install fastdit[bench]")


def write_report(results: Sequence[Path], output: Path) -> Path:
    """Write a report and return its path.

    Args:
        results: Files of rows.
        output: A page, ``.html``, or Markdown, ``.md``.

    Raises:
        InputError: A file cannot be read, or there are no rows.
    """
    from ..bench.report.page import html, markdown

    rows = [row for path in results for row in read(path)]
    if not rows:
        raise InputError(f"no results in {', '.join(map(str, results))}")
    try:
        text = markdown(rows) if output.suffix.lower() == ".md" else html(rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"a row in {', '.join(map(str, results))} lacks fields that a report shows ({error!r}); "
            "was it written by another version of fastdit?"
        ) from error
    with moved_when_complete(output) as part:
        part.write_text(text, encoding="utf-8")
    return output


def check_command(command: str | None) -> None:
    """Check a scoring command.

    Args:
        command: The command; ``None`` for none.

    Raises:
        InputError: There is no such program, or the command has no ``{folder}``.
    """
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--score-with is not a valid command ({error}), got {command!r}") from error
    if not any("{folder}" in word for word in words):
        raise InputError("--score-with has no {folder}; write {folder} where the folder of videos belongs")
    if shutil.which(words[0]) is None:
        raise InputError(f"--score-with: no program {words[0]!r} was found")


def score_folders(command: str, videos: Path, screen: Screen) -> None:
    """Run a command on the videos of each setting and of dense attention, and keep its output as ``scores.txt``.

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
