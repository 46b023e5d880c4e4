"""``fastdit bench``: how fast and how good, always beside dense attention of the same run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_options as own
from . import options
from .assemble import assembled
from .bench_report import report
from .bench_session import Session
from .errors import guarded

bench = typer.Typer(
    name="bench",
    help="Measure speed and quality, always beside dense attention of the same run, and report them.",
    no_args_is_help=True,
)
bench.command()(report)


def _prompt(text: str | None) -> str | None:
    from .errors import InputError
    from .prompts import read_prompts

    try:
        return None if text is None else read_prompts(text, None)[0]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


Prompt = Annotated[str | None, typer.Option(callback=_prompt, help="What the pipeline makes.", show_default=False)]


@bench.command()
@guarded
@assembled(session=partial(own.open_session, output=Path("bench-kernels.jsonl")))
def kernels(
    *,
    problems: Annotated[str, typer.Option(help="Models and sizes, or own ones as 8x16x16/4x64.")] = "demo",
    densities: own.Densities = "0.1,0.2,0.5",
    blocks: Annotated[str, typer.Option(help="Queries and keys in a block.")] = "64x64",
    contenders: Annotated[
        str | None, typer.Option(help="Only these, as in sdpa-flash,fastdit-cpu.", show_default=False)
    ] = None,
    repeats: own.Repeats = 5,
    session: Session,
) -> None:
    """Time attention kernels over the same blocks: ours and all that are installed, each checked first."""
    from .bench_build import build_kernels

    only = None if contenders is None else own.split(contenders)
    sizes, wanted = own.read_blocks(blocks), own.read_densities(densities)
    session.run(lambda s: build_kernels(s, own.split(problems), wanted, sizes, repeats, only))


@bench.command()
@guarded
@assembled(session=partial(own.open_session, output=Path("bench-methods.jsonl")), size=own.read_size)
def methods(
    *,
    problems: Annotated[str, typer.Option(help="Sizes of the calls that are made up; empty for none.")] = "demo",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also capture calls of this pipeline: demo, a folder, or a hub id."),
    ] = None,
    prompt: Prompt = None,
    settings: own.Settings = None,
    means: own.Means = False,
    densities: own.Densities = "0.1,0.2,0.3",
    size: dict[str, Any],
    session: Session,
) -> None:
    """Measure on single attention calls how near methods come to dense attention, at equal realised density."""
    from .bench_build import build_methods
    from .bench_model import Model

    found = None if model is None else Model.find(model, size)
    chosen, wanted = own.read_settings(settings, means=means), own.read_densities(densities)
    own.check_files(session, chosen, found)
    session.run(lambda s: build_methods(s, own.split(problems), chosen, wanted, found, prompt))


@bench.command()
@guarded
@assembled(
    session=partial(own.open_session, output=Path("bench-quality.jsonl")),
    schedule=own.read_steps,
    size=own.read_size,
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
    settings: own.Settings = None,
    means: own.Means = False,
    densities: own.Densities = "0.2,0.35",
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
    from .bench_build import build_quality
    from .bench_model import Model
    from .bench_scores import check_command, score_folders
    from .prompts import read_prompts
    from .video import check_ffmpeg

    check_ffmpeg()
    check_command(score_with)
    texts = None if prompts is None else read_prompts(None, prompts)
    found = Model.find(model, size)
    known = found.prompts(texts, "some with --prompts FILE, one a line")
    count = 4 if count is None and texts is None else count
    chosen, wanted = own.read_settings(settings, means=means, schedule=schedule), own.read_densities(densities)
    folder = session.output.with_suffix(".videos") if videos is None else videos
    own.check_files(session, chosen, found, prompts=prompts, videos=folder)
    session.run(lambda s: build_quality(s, found, known, count, seeds, chosen, wanted, folder))
    if score_with is not None and not session.dry_run and session.team.is_first:
        score_folders(score_with, folder, session.screen)
    session.team.close()


@bench.command()
@guarded
@assembled(session=partial(own.open_session, output=Path("bench-e2e.jsonl")), size=own.read_size)
def e2e(
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, a folder, or a hub id; default: demo.")
    ] = None,
    problems: Annotated[
        str, typer.Option(help="Real configurations that get random weights, as in wan-1.3b-480p.")
    ] = "",
    prompt: Prompt = None,
    settings: own.Settings = "default",
    means: own.Means = False,
    densities: own.MaybeDensities = None,
    repeats: own.Repeats = 3,
    size: dict[str, Any],
    session: Session,
) -> None:
    """Time whole videos, dense and sparse in turn, beside what the share of attention predicts."""
    from .bench_build import build_e2e
    from .bench_model import Model

    name = "demo" if model is None and not problems else model
    found = None if name is None else Model.find(name, size)
    chosen = own.read_settings(settings, means=means)
    wanted = [] if densities is None else own.read_densities(densities)
    listed = own.split(problems)
    own.check_files(session, chosen, found)
    session.run(lambda s: build_e2e(s, chosen, wanted, repeats, found, listed, prompt=prompt))


@bench.command("all")
@guarded
@assembled(session=partial(own.open_session, output=Path("bench.jsonl")))
def everything(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few videos: minutes on two cores.")] = False,
    session: Session,
) -> None:
    """Run all four benchmarks on the demo and on calls that are made up, and write the report beside the results."""
    from .bench_everything import build_everything
    from .bench_report import check_packages, write_report
    from .video import check_ffmpeg

    check_ffmpeg()
    check_packages()
    page = session.output.with_suffix(".html")
    own.check_files(session, videos=session.output.with_suffix(".videos"), page=page)
    session.run(lambda s: build_everything(s, quick=quick))
    if not session.dry_run and session.team.is_first:
        session.screen.note(f"the report is {write_report([session.output], page)}")
    session.team.close()
