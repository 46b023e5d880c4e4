"""Options that several benchmarks take, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .bench_session import Session
from .errors import InputError, as_input_error
from .options import ATTENTION, OUTPUT
from .search import split_candidates

if TYPE_CHECKING:
    from ..bench.settings import Setting
    from .bench_model import Model

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
Seed = Annotated[int, typer.Option(callback=options.SEED, help="Of everything that is random.")]
Repeats = Annotated[int, typer.Option(callback=options.COUNT, help="Rounds after the warm-up.")]
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


def open_session(
    output: Output,
    resume: Resume = False,
    against: Against = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
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
    from .models import choose_device
    from .prompts import Team
    from .screen import Screen
    from .video import check_target

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
    from .apart import check_apart, plan_files
    from .video import check_folder, check_name

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
    from ..bench.settings import find_settings

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
    from ..attention.base import check_density

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
    if min(queries, keys) < 1 or max(queries, keys) > options.MOST:
        raise InputError(f"blocks hold at least one query and one key, and at most {options.MOST}, got {text!r}")
    return queries, keys


def read_steps(
    warmup_steps: options.WarmupSteps = None,
    tail_steps: options.TailSteps = None,
    dense_layers: options.DenseLayers = None,
    refresh_steps: options.RefreshSteps = None,
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
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
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
