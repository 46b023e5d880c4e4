"""``fastdit generate``: make videos with sparse attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..files import moved_when_complete
from ..generation.jobs import plan_jobs, read_prompts
from ..generation.report import COVERS, ratio
from .apart import check_apart, plan_files
from .assemble import command
from .console import add_row, json_text, number, plain_table
from .options import (
    MACHINE,
    OUTPUT,
    SEED,
    VIDEO,
    MachineOptions,
    MethodOptions,
    Model,
    OutputOptions,
    VideoOptions,
    option,
    within,
)


@command
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    prompts: Annotated[Path | None, option("Text file with one prompt per line, instead of PROMPT.")] = None,
    model: Model = "demo",
    *,
    attention: MethodOptions,
    video: VideoOptions,
    seed: Annotated[int, option("Seed of the noise, the same for every prompt.", callback=SEED, panel=VIDEO)] = 0,
    fps: Annotated[float | None, option("Frames per second of the file.", callback=within(1, 240), panel=VIDEO)] = None,
    machine: MachineOptions,
    compiled: Annotated[
        bool, option("Compile the transformer with torch.compile.", "--compile", panel=MACHINE)
    ] = False,
    output: Annotated[
        Path | None,
        option(
            "File (.mp4, .mkv, .mov) or folder (default: a file here, named after the prompt).",
            "--output",
            "-o",
            panel=OUTPUT,
        ),
    ] = None,
    compare: Annotated[
        bool,
        option("Also make the dense video and a side-by-side video, and measure both.", "--compare", panel=OUTPUT),
    ] = False,
    report: Annotated[Path | None, option("Write all numbers to this JSON file.", panel=OUTPUT)] = None,
    out: OutputOptions,
) -> None:
    """Make videos with sparse attention.

    The default model is the demo model that comes with fastdit. It needs no download and no GPU.
    Under accelerate launch the prompts are divided among the processes.
    """
    from ..generation.video import check_ffmpeg, check_target

    jobs = plan_jobs(read_prompts(prompt, prompts), output, single=prompt is not None, compare=compare)
    if report is not None:
        check_target(report, None)
    check_ffmpeg()

    from ..generation.loading import device_name
    from ..generation.sources import find_model

    settings = attention.read()
    machine.check()
    source = find_model(model)
    check_apart(
        [*(named for job in jobs for named in job.files(compare=compare).items()), ("--report", report)],
        [
            ("--prompts", prompts),
            *plan_files(attention.plan),
            *settings.files(),
            *(("--model", file) for file in source.files()),
        ],
    )

    from ..generation.report import summarize
    from ..generation.studio import Studio

    team, device = machine.team, machine.device
    mine = team.share(jobs)
    screen = out.screen(shown=team.is_first)
    clips: list[dict[str, Any]] = []
    with screen.working(), out.quiet_libraries():
        if mine:
            bar = screen.start("loading")
            pipeline = machine.load(source, compiled=compiled)
            bar.finish()
            given = video.arguments()
            studio = Studio.open(
                pipeline, source, given, settings=settings, seed=seed, fps=fps, device=device, screen=screen
            )
            clips = [studio.make(job, compare=compare) for job in mine]
        clips = team.gather(clips)
    if team.is_first:
        about = {
            "model": model,
            "plan": None if attention.plan is None else str(attention.plan),
            "seed": seed,
            "device": device_name(device),
            **machine.describe(),
            "compile": compiled,
        }
        value = summarize(clips, about)
        if report is not None:
            with moved_when_complete(report) as part:
                part.write_text(json_text(value) + "\n", encoding="utf-8")
        screen.result(value, *tables(value))
    team.close()


def tables(report: dict[str, Any]) -> list[Table]:
    """Make the tables of a report: one of all videos, and one of each if there are several.

    Args:
        report: As ``summarize`` returns it.
    """
    compared = report["dense_seconds"] is not None
    columns = ("dense", "sparse", "speed-up") if compared else ("",)
    title = f"{report['plan'] or report['method']} on {report['model']}"
    table = plain_table(title, "", *columns, caption=f"times include {COVERS}")

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
