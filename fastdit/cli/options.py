"""Options that several commands share, and how they are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..generation.errors import InputError, as_input_error
from .bench_session import Session

if TYPE_CHECKING:
    from ..bench.inputs.settings import Setting
    from ..bench.model import Model


ATTENTION, VIDEO, MACHINE, OUTPUT = "Sparse attention", "Video", "Machine", "Output"

MOST, MOST_PIXELS = 100_000, 65_536
"""More frames, steps or pixels than these are a slip of the pen."""

Output = Annotated[
    Path, typer.Option("--output", "-o", help="JSON lines, one for each measurement.", rich_help_panel=OUTPUT)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep what the file has, and measure the rest.", rich_help_panel=OUTPUT)
]
Against = Annotated[
    Path | None,
    typer.Option(
        help="Results of an earlier run: show what changed beyond noise.", rich_help_panel=OUTPUT, show_default=False
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run, and about how long.", rich_help_panel=OUTPUT)
]


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


SEED = within(-(2**63), 2**64 - 1)
"""What torch takes."""

Seed = Annotated[int, typer.Option(callback=SEED, help="Of everything that is random.")]

COUNT = within(1, MOST)

Repeats = Annotated[int, typer.Option(callback=COUNT, help="Rounds after the warm-up.")]
Densities = Annotated[
    str, typer.Option(help="Fractions of the pairs to compute, as in 0.1,0.2.", rich_help_panel=ATTENTION)
]
MaybeDensities = Annotated[
    str | None,
    typer.Option(
        help="Fractions of the pairs to compute, as in 0.1,0.2 (default: those that the settings have by themselves).",
        rich_help_panel=ATTENTION,
        show_default=False,
    ),
]
Settings = Annotated[
    str | None,
    typer.Option(
        help="Methods or plans, as in default,sla(density=0.1),plan.json (default: all).",
        rich_help_panel=ATTENTION,
        show_default=False,
    ),
]
Means = Annotated[
    bool,
    typer.Option(
        "--means", help="Each method also with blocks that stand in by their means.", rich_help_panel=ATTENTION
    ),
]


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


def open_session(
    output: Output,
    resume: Resume = False,
    against: Against = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Session:
    """Check what all benchmarks are told.

    Args:
        output: File of rows.
        resume: Whether rows that are there are kept.
        against: File of rows to compare with.
        dry_run: Whether only to say what would run.
        seed: Of everything that is random.
        device: ``"auto"`` or a torch device.
        dtype: One of ``DTYPES`` of the models.
        quiet: Show nothing but errors.
        as_json: Write results as JSON.
        debug: Show where errors came from.
    """
    from ..generation.loading import choose_device
    from ..generation.processes import Team
    from ..generation.video import check_target
    from .console import Screen

    check_target(output, None)
    team = Team(device)
    device = choose_device((team.device or device) if device in ("auto", "cuda") else device)
    screen = Screen(quiet=quiet, as_json=as_json, shown=team.is_first)
    return Session(output, resume, against, dry_run, seed, device, dtype, screen, team, debug)


def check_files(
    session: Session,
    settings: Sequence[Setting] = (),
    model: Model | None = None,
    *,
    prompts: Path | None = None,
    videos: Path | None = None,
    page: Path | None = None,
) -> None:
    """Check that nothing is written over what is read or written elsewhere, nor over files of another run.

    Args:
        session: What was asked for.
        settings: The settings, of which some are plans.
        model: The pipeline.
        prompts: File of prompts.
        videos: Folder of videos.
        page: File of the report.

    Raises:
        InputError: Something would be, or the folder cannot be written.
    """
    from ..generation.video import check_folder, check_name
    from .apart import check_apart, plan_files

    plans = (Path(setting.fields["path"]) for setting in settings if setting.method == "plan")
    read = [("--prompts", prompts)]
    read += [named for plan in plans for named in plan_files(plan, "--settings")]
    read += [] if model is None else [("--model", file) for file in model.source.files()]
    new = [("--videos", videos), ("the report", page)]
    check_apart([("--output", session.output), *new], read)
    check_apart(new, [("--against", session.against)])  # rows may be added to those that they are compared with
    for path in (videos, page):
        if path is not None:
            check_name(path)
    if videos is not None:
        check_folder(next(place for place in (videos, *videos.parents) if place.exists()), option="--videos")
    for path in (videos, page) if not session.resume and not session.dry_run else ():
        if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
            raise InputError(f"{path} is there already; go on with it by --resume, or name another with --output")


def split(text: str) -> list[str]:
    """Split a list at its commas.

    Args:
        text: Such as ``"draft, sla"``.
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def read_settings(texts: str | None, *, means: bool, schedule: dict[str, Any] | None = None) -> list[Setting]:
    """Read settings from a list.

    Args:
        texts: What ``find_settings`` reads, separated by commas; ``None`` for all.
        means: Whether each is listed a second time with blocks that stand in by their means.
        schedule: Fields of ``Schedule`` that all of them get.

    Raises:
        InputError: There is no such setting.
    """
    from ..bench.inputs.settings import find_settings
    from ..search.candidates import split_candidates

    with as_input_error():
        found = find_settings(None if texts is None else split_candidates(texts), means=means)
        return [setting.changed(**schedule or {}) for setting in found]


def read_densities(text: str) -> list[float]:
    """Read fractions from text.

    Args:
        text: Such as ``"0.1, 0.2"``.

    Raises:
        InputError: One is no fraction in (0, 1].
    """
    from ..attention.method import check_density

    try:
        values = [float(part) for part in split(text)]
    except ValueError as error:
        raise InputError(f"densities are numbers separated by commas, as in 0.1,0.2; got {text!r}") from error
    with as_input_error():
        for value in values:
            check_density(value)
    if not values:
        raise InputError("there is no density; write --densities 0.1,0.2")
    return values


def read_blocks(text: str) -> tuple[int, int]:
    """Read the size of blocks.

    Args:
        text: Such as ``"128x64"``.

    Raises:
        InputError: It is no such thing.
    """
    try:
        queries, keys = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise InputError(f"blocks are QUERIESxKEYS, as in 128x64; got {text!r}") from error
    if min(queries, keys) < 1 or max(queries, keys) > MOST:
        raise InputError(f"blocks hold at least one query and one key, and at most {MOST}, got {text!r}")
    return queries, keys


def read_steps(
    warmup_steps: WarmupSteps = None,
    tail_steps: TailSteps = None,
    dense_layers: DenseLayers = None,
    refresh_steps: RefreshSteps = None,
) -> dict[str, Any]:
    """Return the fields of ``Schedule`` that were given.

    Args:
        warmup_steps: First steps kept dense, as text; ``None`` where nothing was said, like the others.
        tail_steps: Last steps kept dense.
        dense_layers: Layers kept dense.
        refresh_steps: When masks are rebuilt.

    Raises:
        InputError: One is malformed or out of range.
    """
    from .settings import read_schedule

    given = {
        "warmup_steps": warmup_steps,
        "tail_steps": tail_steps,
        "dense_layers": dense_layers,
        "refresh_steps": refresh_steps,
    }
    return read_schedule(given)


def read_size(
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
) -> dict[str, Any]:
    """Return the keywords of a pipeline's call.

    Args:
        height: Pixels; ``None`` where nothing was said, like the others.
        width: Pixels.
        frames: Length of the video.
        steps: Denoising steps.
        guidance: How strongly the prompt is followed, at least 0.
    """
    return {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
