"""``fastdit bench``: how fast and how good, always beside dense attention of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import bench_options as own
from . import options
from .bench_report import report
from .errors import InputError, guarded

bench = typer.Typer(
    name="bench",
    help="Measure speed and quality, always beside dense attention of the same run, and report them.",
    no_args_is_help=True,
)
bench.command()(report)

Videos = Annotated[
    Path | None,
    typer.Option(help="Folder for videos (default: beside the results).", show_default=False),
]
Prompts = Annotated[
    Path | None, typer.Option(help="A text file with one prompt a line (default: the demo's).", show_default=False)
]


@bench.command()
@guarded
def kernels(
    problems: Annotated[str, typer.Option(help="Models and sizes, or own ones as 8x16x16/4x64.")] = "demo",
    densities: own.Densities = "0.1,0.2,0.5",
    blocks: Annotated[str, typer.Option(help="Queries and keys in a block.")] = "64x64",
    contenders: Annotated[
        str | None, typer.Option(help="Only these, as in sdpa-flash,fastdit-cpu.", show_default=False)
    ] = None,
    repeats: own.Repeats = 5,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: own.Output = Path("bench-kernels.jsonl"),
    resume: own.Resume = False,
    against: own.Against = None,
    dry_run: own.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Time attention kernels over the same blocks: ours and all that are installed, each checked first."""
    session = own.open_session(
        output=output,
        resume=resume,
        against=against,
        dry_run=dry_run,
        seed=seed,
        device=device,
        dtype=dtype,
        quiet=quiet,
        as_json=as_json,
        debug=debug,
    )
    from .bench_build import build_kernels

    only = None if contenders is None else own.split(contenders)
    sizes, wanted = own.read_blocks(blocks), own.read_densities(densities)
    session.run(lambda s: build_kernels(s, own.split(problems), wanted, sizes, repeats, only))


@bench.command()
@guarded
def methods(
    problems: Annotated[str, typer.Option(help="Sizes of the calls that are made up; empty for none.")] = "demo",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also capture calls of this pipeline: demo, a folder, or a hub id."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What it makes then.", show_default=False)] = None,
    settings: own.Settings = None,
    means: own.Means = False,
    densities: own.Densities = "0.1,0.2,0.35",
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: own.Output = Path("bench-methods.jsonl"),
    resume: own.Resume = False,
    against: own.Against = None,
    dry_run: own.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure on single attention calls how near methods come to dense attention, at equal realised density."""
    session = own.open_session(
        output=output,
        resume=resume,
        against=against,
        dry_run=dry_run,
        seed=seed,
        device=device,
        dtype=dtype,
        quiet=quiet,
        as_json=as_json,
        debug=debug,
    )
    from .bench_build import build_methods
    from .bench_model import Model

    given = own.call_options(height, width, frames, steps, guidance)
    found = None if model is None else Model.find(model, given)
    chosen, wanted = own.read_settings(settings, means=means), own.read_densities(densities)
    session.run(lambda s: build_methods(s, own.split(problems), chosen, wanted, found, prompt))


@bench.command()
@guarded
def quality(
    model: options.Model = "demo",
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each.")] = 1,
    settings: own.Settings = None,
    means: own.Means = False,
    densities: own.Densities = "0.2,0.35",
    warmup_steps: options.WarmupSteps = None,
    tail_steps: options.TailSteps = None,
    dense_layers: options.DenseLayers = None,
    refresh_steps: options.RefreshSteps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    videos: Videos = None,
    score_with: Annotated[
        str | None,
        typer.Option(help="Command for each folder of videos, as in 'vbench evaluate --videos_path {folder} ...'."),
    ] = None,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: own.Output = Path("bench-quality.jsonl"),
    resume: own.Resume = False,
    against: own.Against = None,
    dry_run: own.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Make videos with each method beside dense ones of the same prompt and seed, at equal realised density.

    Under accelerate launch the prompts are divided among the processes.
    """
    session = own.open_session(
        output=output,
        resume=resume,
        against=against,
        dry_run=dry_run,
        seed=seed,
        device=device,
        dtype=dtype,
        quiet=quiet,
        as_json=as_json,
        debug=debug,
    )
    from ..schedule import Schedule
    from . import settings as reading
    from .bench_build import build_quality
    from .bench_model import Model
    from .bench_scores import check_command, score_folders
    from .prompts import read_prompts
    from .video import check_ffmpeg

    check_ffmpeg()
    check_command(score_with)
    texts = None if prompts is None else read_prompts(None, prompts)
    found = Model.find(model, own.call_options(height, width, frames, steps, guidance))
    chosen, wanted = own.read_settings(settings, means=means), own.read_densities(densities)
    steps_kept = {
        "warmup_steps": warmup_steps,
        "tail_steps": tail_steps,
        "dense_layers": dense_layers,
        "refresh_steps": refresh_steps,
    }
    given = reading.read_schedule(steps_kept)
    folder = output.with_suffix(".videos") if videos is None else videos
    listed = found.prompts(texts, count)
    schedule = Schedule(**given) if given else None
    session.run(lambda s: build_quality(s, found, listed, seeds, chosen, wanted, folder, schedule))
    if score_with is not None and not dry_run and session.team.is_first:
        score_folders(score_with, folder, session.screen)
    session.team.close()


@bench.command()
@guarded
def e2e(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="demo, a folder, or a hub id; default: demo.")
    ] = None,
    problems: Annotated[
        str, typer.Option(help="Real configurations that get random weights, as in wan-1.3b-480p.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="What the pipeline makes.", show_default=False)] = None,
    settings: own.Settings = "draft-4x4x4",
    means: own.Means = False,
    densities: own.Densities = "0.2",
    passes: Annotated[int, typer.Option(min=1, help="Forward passes of a run with random weights.")] = 2,
    repeats: own.Repeats = 3,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: own.Output = Path("bench-e2e.jsonl"),
    resume: own.Resume = False,
    against: own.Against = None,
    dry_run: own.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Time whole videos, dense and sparse in turn, beside what the share of attention predicts."""
    session = own.open_session(
        output=output,
        resume=resume,
        against=against,
        dry_run=dry_run,
        seed=seed,
        device=device,
        dtype=dtype,
        quiet=quiet,
        as_json=as_json,
        debug=debug,
    )
    from .bench_build import build_e2e
    from .bench_model import Model

    name = "demo" if model is None and not problems else model
    found = None if name is None else Model.find(name, own.call_options(height, width, frames, steps, guidance))
    chosen, wanted = own.read_settings(settings, means=means), own.read_densities(densities)
    session.run(
        lambda s: build_e2e(s, chosen, wanted, repeats, found, own.split(problems), prompt=prompt, passes=passes)
    )


@bench.command("all")
@guarded
def everything(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few videos: minutes on two cores.")] = False,
    seed: own.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: own.Output = Path("bench.jsonl"),
    resume: own.Resume = False,
    against: own.Against = None,
    dry_run: own.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Run all four benchmarks on the demo and on calls that are made up, and write the report beside the results."""
    session = own.open_session(
        output=output,
        resume=resume,
        against=against,
        dry_run=dry_run,
        seed=seed,
        device=device,
        dtype=dtype,
        quiet=quiet,
        as_json=as_json,
        debug=debug,
    )
    from .bench_everything import build_everything
    from .bench_report import write_report
    from .video import check_ffmpeg

    check_ffmpeg()
    session.run(lambda s: build_everything(s, quick=quick))
    if not dry_run and session.team.is_first:
        try:
            page = write_report([output], output.with_suffix(".html"))
        except ImportError as error:
            raise InputError(f"the report needs {error.name}; install fastdit[bench]") from error
        session.screen.note(f"the report is {page}")
    session.team.close()
