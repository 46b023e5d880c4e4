"""``fastdit generate``: make videos with sparse attention."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import moved_when_complete
from . import options
from .apart import check_apart, plan_files
from .errors import guarded
from .options import ATTENTION, MACHINE, OUTPUT, VIDEO
from .prompts import Team, plan_jobs, read_prompts
from .screen import Screen, json_text


@guarded
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line, instead of PROMPT.", show_default=False)
    ] = None,
    model: options.Model = "demo",
    method: Annotated[
        str | None,
        typer.Option(
            help="Which blocks are computed; see fastdit info (default: best known for the model).",
            rich_help_panel=ATTENTION,
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of blocks to compute, in (0, 1].", rich_help_panel=ATTENTION, show_default=False),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set a field of the method; may be repeated.",
            rich_help_panel=ATTENTION,
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan that fastdit search has written, instead of a method.",
            rich_help_panel=ATTENTION,
            show_default=False,
        ),
    ] = None,
    warmup_steps: options.WarmupSteps = None,
    tail_steps: options.TailSteps = None,
    dense_layers: options.DenseLayers = None,
    refresh_steps: options.RefreshSteps = None,
    kernel: options.Kernel = None,
    precision: options.Precision = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    seed: Annotated[
        int, typer.Option(callback=options.SEED, help="Of the noise; the same for every prompt.", rich_help_panel=VIDEO)
    ] = 0,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    fps: Annotated[
        float | None,
        typer.Option(
            callback=options.within(1, 240),
            help="Frames per second of the file.",
            rich_help_panel=VIDEO,
            show_default=False,
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer with torch.compile.", rich_help_panel=MACHINE)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A file (.mp4, .mkv, .mov) or a folder (default: here, named after the prompt).",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also make the dense video and one with both side by side; measure both.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write all numbers to this JSON file.", rich_help_panel=OUTPUT, show_default=False),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Make videos with sparse attention.

    Without --model the demo model that comes with fastdit is used: it needs no download and no GPU.
    Under accelerate launch the prompts are divided among the processes.
    """
    from . import video

    jobs = plan_jobs(read_prompts(prompt, prompts), output, single=prompt is not None, compare=compare)
    if report is not None:
        video.check_target(report, None)
    video.check_ffmpeg()

    from . import models
    from .settings import read_settings
    from .sources import find_model

    settings = read_settings(
        method=method,
        density=density,
        assignments=assignments or [],
        plan=plan,
        schedule={
            "warmup_steps": warmup_steps,
            "tail_steps": tail_steps,
            "dense_layers": dense_layers,
            "refresh_steps": refresh_steps,
        },
        kernel=kernel,
        precision=precision,
    )
    team = Team(device)
    device = models.choose_device((team.device or device) if device in ("auto", "cuda") else device)
    models.check_offload(offload, device)
    weights = models.choose_dtype(dtype, device)
    source = find_model(model)
    check_apart(
        [*(named for job in jobs for named in job.files(compare=compare).items()), ("--report", report)],
        [("--prompts", prompts), *plan_files(plan), *settings.files(), *(("--model", file) for file in source.files())],
    )

    from . import making, results

    given = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
    }
    mine = team.share(jobs)
    screen = Screen(quiet=quiet, as_json=as_json, shown=team.is_first)
    found: list[dict[str, Any]] = []
    with screen.working(), contextlib.nullcontext() if debug else models.quiet_libraries():
        if mine:
            bar = screen.start("loading")
            pipeline = models.load_model(source, device=device, dtype=weights, offload=offload, compiled=compiled)
            bar.finish()
            studio = making.Studio.open(
                pipeline, source, given, settings=settings, seed=seed, fps=fps, device=device, screen=screen
            )
            found = [studio.make(job, compare=compare) for job in mine]
        clips = team.gather(found)
    if team.is_first:
        about = {
            "model": model,
            "plan": None if plan is None else str(plan),
            "seed": seed,
            "device": models.device_name(device),
            "dtype": str(weights).removeprefix("torch."),
            "offload": offload,
            "compile": compiled,
        }
        value = results.summarize(clips, about)
        if report is not None:
            with moved_when_complete(report) as part:
                part.write_text(json_text(value) + "\n", encoding="utf-8")
        screen.result(value, *results.tables(value))
    team.close()
