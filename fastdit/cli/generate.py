"""``fastdit generate``: make videos with sparse attention."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import guarded
from .prompts import Team, plan_jobs, read_prompts
from .screen import Screen

SPARSE, VIDEO, MACHINE, OUTPUT = "Sparse attention", "Video", "Machine", "Output"


@guarded
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line, instead of PROMPT.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="demo, a folder, or a hub id.")] = "demo",
    method: Annotated[
        str | None,
        typer.Option(
            help="Which blocks are computed; see fastdit info (default: best known for the model).",
            rich_help_panel=SPARSE,
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of blocks to compute, in (0, 1].", rich_help_panel=SPARSE, show_default=False),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set a field of the method; may be repeated.",
            rich_help_panel=SPARSE,
            show_default=False,
        ),
    ] = None,
    warmup_steps: Annotated[
        str | None,
        typer.Option(
            help="First steps kept dense: a count, or a fraction as in 0.25.",
            metavar="STEPS",
            rich_help_panel=SPARSE,
            show_default=False,
        ),
    ] = None,
    tail_steps: Annotated[
        str | None,
        typer.Option(
            help="Last steps kept dense: a count or a fraction.",
            metavar="STEPS",
            rich_help_panel=SPARSE,
            show_default=False,
        ),
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers kept dense, as in 0,1,-1.", metavar="LAYERS", rich_help_panel=SPARSE, show_default=False
        ),
    ] = None,
    refresh_steps: Annotated[
        str | None,
        typer.Option(
            help="Rebuild masks every so many steps, or at the steps listed.",
            metavar="STEPS",
            rich_help_panel=SPARSE,
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="What computes the blocks; see fastdit info.", rich_help_panel=SPARSE, show_default=False),
    ] = None,
    precision: Annotated[
        Literal["int8", "int8_fp8"] | None,
        typer.Option(help="Products in low precision.", rich_help_panel=SPARSE, show_default=False),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=VIDEO, show_default=False)
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=VIDEO, show_default=False)] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the video.", rich_help_panel=VIDEO, show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=VIDEO, show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the noise; the same for every prompt.", rich_help_panel=VIDEO)
    ] = 0,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="How strongly the prompt is followed.", rich_help_panel=VIDEO, show_default=False),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the video shall not show.", rich_help_panel=VIDEO, show_default=False)
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=1, max=240, help="Frames per second of the file.", rich_help_panel=VIDEO, show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="Of the weights; auto is bfloat16 on CUDA, else float32.", rich_help_panel=MACHINE),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel=MACHINE)] = "auto",
    offload: Annotated[
        Literal["none", "model", "sequential", "group"],
        typer.Option(help="Keep weights on the CPU until they are needed.", rich_help_panel=MACHINE),
    ] = "none",
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
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show nothing but errors.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Write all numbers to stdout as JSON, and nothing else.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make videos with sparse attention.

    Without --model the demo model that comes with fastdit is used: it needs no download and no GPU.
    Under accelerate launch the prompts are divided among the processes.
    """
    from . import video

    jobs = plan_jobs(read_prompts(prompt, prompts), output, single=prompt is not None)
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
            "seed": seed,
            "device": models.device_name(device),
            "dtype": str(weights).removeprefix("torch."),
            "offload": offload,
            "compile": compiled,
        }
        value = results.summarize(clips, about)
        if report is not None:
            with video.moved_when_complete(report) as part:
                part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        screen.result(value, *results.tables(value))
    team.close()
