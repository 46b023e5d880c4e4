"""``fastdit compare``: how close two videos are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generation.errors import InputError
from .assemble import command
from .console import Screen, add_row, number, plain_table
from .options import OutputOptions

if TYPE_CHECKING:
    from ..generation.video import VideoFile


@command
def compare(
    a: Annotated[Path, typer.Argument(help="Video file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Video file of the same size and length.", show_default=False)],
    out: OutputOptions,
) -> None:
    """Measure how close two videos are: PSNR and SSIM over all frames and of the worst frame."""
    from ..generation.video import VideoFile, check_ffmpeg

    check_ffmpeg(writes=False)
    first, second = VideoFile.open(a), VideoFile.open(b)
    if (first.width, first.height) != (second.width, second.height):
        raise InputError(
            f"the videos differ in size: {a} is {first.width} x {first.height}, {b} is {second.width} x "
            f"{second.height} (width x height); compare videos of one size"
        )
    screen = out.screen()
    with screen.working():
        value: dict[str, Any] = {"a": str(a), "b": str(b)} | _measure(first, second, screen)
    caption = f"{value['frames']} frames of {first.width} x {first.height}; frames count from 0"
    table = plain_table(f"{a} and {b}", "", "all frames", "worst frame", "frame", caption=caption)
    worst = value["worst_frame"]
    for name, form in (("psnr", "{:.2f} dB"), ("ssim", "{:.4f}")):
        low = worst[name]
        add_row(table, name.upper(), number(value[name], form), number(low["value"], form), number(low["frame"], "{}"))
    screen.result(value, table)


def _measure(first: VideoFile, second: VideoFile, screen: Screen) -> dict[str, Any]:
    import torch

    from .. import metrics
    from ..generation.report import decibels, mean_decibels

    psnr: list[float] = []
    ssim: list[float] = []
    small = min(first.width, first.height) < metrics.SSIM_WINDOW
    bar = screen.start("comparing")
    pairs = itertools.zip_longest(first.frames(), second.frames())
    for count, (x, y) in enumerate(pairs):
        if x is None or y is None:
            short, long = (first, second) if x is None else (second, first)
            raise InputError(
                f"the videos differ in length: {short.path} has {count} frames, {long.path} has more; "
                "compare videos of one length"
            )
        x, y = (torch.from_numpy(frame)[None].float() / 255 for frame in (x, y))
        psnr.append(float(metrics.psnr(x, y)))
        ssim.extend([] if small else [float(metrics.ssim(x, y))])
        bar.advance()
    bar.finish()
    if not psnr:
        raise InputError(f"{first.path} and {second.path} have no frames")
    return {
        "frames": len(psnr),
        "width": first.width,
        "height": first.height,
        "fps": [first.fps, second.fps],
        "psnr": mean_decibels(map(decibels, psnr)),
        "ssim": sum(ssim) / len(ssim) if ssim else None,
        "worst_frame": {"psnr": _worst(psnr, decibels), "ssim": _worst(ssim, float)},
        "per_frame": {"psnr": [decibels(value) for value in psnr], "ssim": ssim or None},
    }


def _worst(values: list[float], write: Any) -> dict[str, Any]:
    if not values:
        return {"frame": None, "value": None}
    low = min(values)
    return {"frame": values.index(low), "value": write(low)}
