"""Options that several commands take."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

ATTENTION, VIDEO, MACHINE, OUTPUT = "Sparse attention", "Video", "Machine", "Output"


MOST, MOST_PIXELS = 100_000, 65_536
"""More frames, steps or pixels than these are a slip of the pen."""


def within(low: float, high: float) -> Any:
    """Return a callback of an option that refuses numbers out of a range, and says what they were.

    Args:
        low: The smallest.
        high: The largest; no range has NaN in it.
    """

    def check(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"it must be in [{low}, {high}], got {value}")
        return value

    return check


COUNT = within(1, MOST)
SEED = within(-(2**63), 2**64 - 1)
"""What torch takes."""


def readable(value: str | None) -> str | None:
    """Return a text that can be written to a file.

    Args:
        value: The text; ``None`` where nothing was said.

    Raises:
        BadParameter: It has bytes that are no letters.
    """
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{value!r} has bytes that are not text in UTF-8.") from error
    return value


def _unset(*names: str, **about: Any) -> Any:
    """Return an option that the user leaves to the model by saying nothing."""
    return typer.Option(*names, show_default=False, **about)


Model = Annotated[str, typer.Option("--model", "-m", help="demo, a folder, or a hub id.")]

WarmupSteps = Annotated[
    str | None,
    _unset(
        help="First steps kept dense: a count, or a fraction as in 0.25.", metavar="STEPS", rich_help_panel=ATTENTION
    ),
]
TailSteps = Annotated[
    str | None,
    _unset(help="Last steps kept dense: a count or a fraction.", metavar="STEPS", rich_help_panel=ATTENTION),
]
DenseLayers = Annotated[
    str | None, _unset(help="Layers kept dense, as in 0,1,-1.", metavar="LAYERS", rich_help_panel=ATTENTION)
]
RefreshSteps = Annotated[
    str | None,
    _unset(
        help="Rebuild masks every so many steps, or at the steps listed.", metavar="STEPS", rich_help_panel=ATTENTION
    ),
]
Kernel = Annotated[str | None, _unset(help="What computes the blocks; see fastdit info.", rich_help_panel=ATTENTION)]
Precision = Annotated[
    Literal["int8", "int8_fp8"] | None, _unset(help="Products in low precision.", rich_help_panel=ATTENTION)
]

Height = Annotated[int | None, _unset(callback=within(1, MOST_PIXELS), help="Pixels.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, _unset(callback=within(1, MOST_PIXELS), help="Pixels.", rich_help_panel=VIDEO)]
Frames = Annotated[int | None, _unset(callback=COUNT, help="Length of the video.", rich_help_panel=VIDEO)]
Steps = Annotated[int | None, _unset(callback=COUNT, help="Denoising steps.", rich_help_panel=VIDEO)]
Guidance = Annotated[
    float | None,
    _unset(callback=within(0, sys.float_info.max), help="How strongly the prompt is followed.", rich_help_panel=VIDEO),
]
NegativePrompt = Annotated[
    str | None, _unset(callback=readable, help="What the video shall not show.", rich_help_panel=VIDEO)
]

Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(help="Of the weights; auto is bfloat16 on CUDA, else float32.", rich_help_panel=MACHINE),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", rich_help_panel=MACHINE)]
Offload = Annotated[
    Literal["none", "model", "sequential", "group"],
    typer.Option(help="Keep weights on the CPU until they are needed.", rich_help_panel=MACHINE),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.", rich_help_panel=OUTPUT)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write all numbers to stdout as JSON, and nothing else.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.", rich_help_panel=OUTPUT)]
