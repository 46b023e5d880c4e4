"""``fastdit generate``: make videos with sparse attention."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..files import moved_when_complete
from ..generation.jobs import plan_jobs, read_prompts
from ..generation.processes import Team
from ..generation.report import COVERS, ratio
from . import options
from .apart import check_apart, plan_files
from .console import Screen, add_row, guarded, json_text, number, plain_table
from .options import ATTENTION, MACHINE, OUTPUT, VIDEO


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
    from ..generation import video

    jobs = plan_jobs(read_prompts(prompt, prompts), output, single=prompt is not None, compare=compare)
    if report is not None:
        video.check_target(report, None)
    video.check_ffmpeg()

    from ..generation import loading as models
    from ..generation.sources import find_model
    from .settings import read_settings

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

    from ..generation import studio as making
    from ..generation.report import summarize

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
        value = summarize(clips, about)
        if report is not None:
            with moved_when_complete(report) as part:
                part.write_text(json_text(value) + "\n", encoding="utf-8")
        screen.result(value, *tables(value))
    team.close()


def tables(report: dict[str, Any]) -> list[Table]:
    """Show a report as tables: what was measured in all, and for each video if there are several.

    Args:
        report: As ``summarize`` returns it.
    """
    compared = report["dense_seconds"] is not None
    columns = ("dense", "sparse", "speed-up") if compared else ("",)
    table = plain_table(f"{report['plan'] or report['method']} on {report['model']}", "", *columns)

    def row(name: str, sparse: str, dense: str = "", gain: str = "") -> None:
        add_row(table, name, *((dense, sparse, gain) if compared else (sparse,)))

    def times(name: str, key: str, speedup: str) -> None:
        sparse, dense = number(report[key], "{:.2f} s"), number(report[f"dense_{key}"], "{:.2f} s")
        row(name, sparse, dense, number(report[speedup], "{:.2f}x"))

    count, steps = len(report["sparse_steps"]), report["steps"]
    density, of_calls = report["density"], report["sparse_call_density"]
    if density is not None and of_calls is not None and abs(density - of_calls) > 0.0005:
        row("density, sparse layers", number(of_calls, "{:.3f}"), "1")
    row(f"density, sparse steps ({count})", number(density, "{:.3f}"), "1")
    row(f"density, all steps ({steps})", number(report["overall_density"], "{:.3f}"), "1")
    times(f"time, sparse steps ({count})", "sparse_steps_seconds", "speedup_sparse_steps")
    times("time, attention", "attention_seconds", "speedup_attention")
    times("time, end to end", "seconds", "speedup")
    if compared:
        row("PSNR to dense", number(report["psnr"], "{:.1f} dB"))
        row("SSIM to dense", number(report["ssim"], "{:.3f}"))
    table.caption = f"times cover {COVERS}"
    table.caption_justify = "left"
    return [table] if len(report["clips"]) == 1 else [table, _clip_table(report["clips"])]


def _clip_table(clips: list[dict[str, Any]]) -> Table:
    table = plain_table(f"{len(clips)} videos", "file", "density", "seconds", "speed-up", "PSNR", "SSIM")
    for clip in clips:
        add_row(
            table,
            Path(clip["file"]).name,
            number(clip["density"], "{:.3f}"),
            number(clip["seconds"]),
            number(ratio(clip["dense_seconds"], clip["seconds"]), "{:.2f}x"),
            number(clip["psnr"], "{:.1f}"),
            number(clip["ssim"], "{:.3f}"),
        )
    return table
