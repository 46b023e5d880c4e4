"""``fastdit search``: find the method and parameters for every layer and head."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..generation.errors import InputError, as_input_error
from . import options
from .console import Bar, Screen, guarded
from .options import ATTENTION, OUTPUT, VIDEO

if TYPE_CHECKING:
    from ..search.sampling import Sampling


LIMIT = "Limit: one of"
LIMITS = ("budget", "target_speedup", "max_error")
CHOICE = "What there is to choose from"
STAGES = {"cost": "timing", "calibrate": "calibrating", "capture": "scoring", "solve": "solving"}

DEMO_PROMPTS = (
    "a big red circle moving right on a striped green background",
    "a small yellow square moving up on a blue background",
    "a white triangle bouncing on a gradient purple background",
    "a blue circle growing on a black background",
)
"""What the demo model knows: shapes of one colour that move."""


@guarded
def search(
    model: options.Model = "demo",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file with one prompt a line, like those that the plan is for (default: four built-in ones).",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Mean density of the sparse calls, in (0, 1] (default: 0.25).",
            rich_help_panel=LIMIT,
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="How many times as fast as dense the attention of a whole run shall be.",
            rich_help_panel=LIMIT,
            show_default=False,
        ),
    ] = None,
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end", help="Let --target-speedup mean all denoising, not attention.", rich_help_panel=LIMIT
        ),
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Relative error of a layer's output, root mean square: 0.1 is 10 %.",
            rich_help_panel=LIMIT,
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="METHODS",
            help="Methods, as in 'draft, radial, draft(density=0.1)' (default: all, at a few densities).",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        Literal["sparse-vdit", "paro"] | None,
        typer.Option(help="The procedure of a paper instead.", rich_help_panel=CHOICE, show_default=False),
    ] = None,
    cost_model: Annotated[
        Path | None,
        typer.Option(
            help="Times of another device: a plan that was searched there, or plan.scores/cost-*.json "
            "(default: this device is timed).",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    warmup_steps: options.WarmupSteps = None,
    tail_steps: options.TailSteps = None,
    refresh_steps: options.RefreshSteps = None,
    buckets: Annotated[
        int | None,
        typer.Option(
            callback=options.COUNT,
            help="Parts of the run that may have methods of their own (default: 3).",
            rich_help_panel=ATTENTION,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            callback=options.COUNT,
            help="Steps of each part to look at (default: 1).",
            rich_help_panel=ATTENTION,
            show_default=False,
        ),
    ] = None,
    kernel: options.Kernel = None,
    precision: options.Precision = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    seed: Annotated[
        int,
        typer.Option(
            callback=options.SEED, help="Of the noise of the first prompt; others have the next.", rich_help_panel=VIDEO
        ),
    ] = 0,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", rich_help_panel=OUTPUT)] = Path(
        "plan.json"
    ),
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where scores are kept, to go on from after a break (default: beside the plan); not with paro.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Find the method and parameters for every layer and head that err least within a limit, and write them to a plan.

    A video of each prompt is made with dense attention, and at some steps all candidates are scored beside it.
    Interrupted, the same command goes on from the scores taken so far; with another limit it takes no new ones.
    """
    from ..generation.jobs import read_prompts
    from ..generation.video import check_folder, check_target
    from .apart import check_apart, plan_files

    texts = None if prompts is None else read_prompts(None, prompts)
    check_target(output, (".json",))
    wanted = {"budget": budget, "target_speedup": target_speedup, "max_error": max_error, "end_to_end": end_to_end}
    listed = _check_request(wanted, candidates, preset, cost=cost_model, folder=folder)
    if folder is None and preset != "paro":  # which keeps no scores
        folder = output.with_suffix(".scores")
    if folder is not None:
        check_folder(folder, new=True, option="--folder")

    from ..generation import loading as models
    from ..generation.sources import DEMO, find_model
    from ..plans.stored_methods import masks_name
    from ..search.cost import CostModel
    from ..search.search import PROMPTS, check_seed
    from .settings import check_kernel, read_schedule

    with as_input_error():
        if preset == "paro":  # masks go beside the plan
            masks_name(output, "0" * 64)
    schedule = read_schedule({"warmup_steps": warmup_steps, "tail_steps": tail_steps, "refresh_steps": refresh_steps})
    check_kernel(kernel)
    with as_input_error():
        times = None if cost_model is None else CostModel.load(cost_model)
    device = models.choose_device(device)
    models.check_offload(offload, device)
    weights = models.choose_dtype(dtype, device)
    source = find_model(model)
    check_apart(
        [("--output", output), ("--folder", folder)],
        [("--prompts", prompts), *plan_files(cost_model, "--cost-model"), *(("--model", f) for f in source.files())],
    )
    if texts is None and source.name == DEMO:
        texts = list(DEMO_PROMPTS)
    with as_input_error():
        check_seed(seed, PROMPTS if texts is None else len(texts))

    from ..generation.report import versions
    from ..generation.sizes import check_sizes
    from ..generation.studio import call_arguments
    from .inspect import about, expected_table, methods_table

    given = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
    }
    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.working(), contextlib.nullcontext() if debug else models.quiet_libraries():
        bar = screen.start("loading")
        pipeline = models.load_model(source, device=device, dtype=weights, offload=offload, compiled=False)
        bar.finish()
        arguments = call_arguments(pipeline, source, given)
        check_sizes(pipeline, arguments)
        start = time.perf_counter()
        with as_input_error(), _kept(folder, screen), _Stages(screen) as progress:
            from ..search.search import search as find

            plan = find(
                pipeline,
                texts,
                **wanted,
                candidates=listed,
                preset=preset,
                sampling=_sampling(pipeline, preset, wanted, schedule, buckets, samples),
                arguments=arguments,
                seed=seed,
                kernel=kernel,
                precision=precision,
                cost=times,
                folder=folder,
                progress=progress,
            )
            plan.save(output)
        screen.note(f"wrote {output}")
        value = {
            "plan": str(output),
            "scores": None if folder is None else str(folder),
            "model": model,
            "seed": seed,
            "dtype": str(weights).removeprefix("torch."),
            "search_seconds": time.perf_counter() - start,
            **about(plan),
            "versions": versions(),
        }
    screen.result(value, expected_table(value, output.name), methods_table(value))


def _check_request(
    wanted: dict[str, Any], candidates: str | None, preset: str | None, **others: Any
) -> list[str] | None:
    """Check what can be checked without a model, and return the candidates that are named."""
    from ..search.allocation import Target
    from ..search.candidates import make_candidates, split_candidates
    from ..search.search import check_preset

    if candidates is not None and preset is not None:
        raise InputError(f"the preset {preset} has candidates of its own: leave out --preset or --candidates")
    listed = None if candidates is None else split_candidates(candidates)
    with as_input_error():
        make_candidates(listed)
        check_preset(preset, [wanted[name] for name in LIMITS], **others)
        if wanted["end_to_end"] or _limited(wanted):
            Target(wanted["budget"], wanted["target_speedup"], wanted["max_error"], wanted["end_to_end"])
    return listed


def _limited(wanted: dict[str, Any]) -> bool:
    return any(wanted[name] is not None for name in LIMITS)


def _sampling(
    pipeline: Any,
    preset: str | None,
    wanted: dict[str, Any],
    schedule: dict[str, Any],
    buckets: int | None,
    samples: int | None,
) -> Sampling:
    from ..search.search import default_sampling

    own = {name: value for name, value in (("buckets", buckets), ("per_bucket", samples)) if value is not None}
    default = default_sampling(pipeline, preset, limited=_limited(wanted))
    return replace(default, schedule=replace(default.schedule, **schedule), **own)


@contextlib.contextmanager
def _kept(folder: Path | None, screen: Screen) -> Any:
    """Say after a failure what was not lost."""
    try:
        yield
    except BaseException:
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            screen.note(f"the scores taken so far are in {folder}; the same command goes on from there")
        raise


class _Stages:
    """Show each stage of a search as a bar of its own.

    Args:
        screen: Where they are shown.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._name = ""
        self._bar: Bar | None = None

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None and kind is None:
            self._bar.finish()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is.

        Args:
            stage: Its name.
            done: Work that is done.
            total: Estimate of all work, itself at least as much.
        """
        if self._bar is None or stage != self._name:
            if self._bar is not None:
                self._bar.finish()
            self._name, self._bar = stage, self._screen.start(STAGES[stage], total)
        self._bar.move(done, total)
