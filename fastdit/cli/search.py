"""``fastdit search``: find the method and parameters for every layer and head."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..generation.errors import InputError, as_input_error
from .assemble import command
from .console import Screen
from .options import (
    ATTENTION,
    COUNT,
    OUTPUT,
    SEED,
    VIDEO,
    KernelOptions,
    MachineOptions,
    Model,
    OutputOptions,
    StepOptions,
    VideoOptions,
    option,
)

if TYPE_CHECKING:
    from ..search.sampling import Sampling


LIMIT, CANDIDATES = "Limit (pass one)", "Candidates"
LIMITS = ("budget", "target_speedup", "max_error")
STAGES = {"cost": "timing", "calibrate": "calibrating", "capture": "scoring", "solve": "solving"}

DEMO_PROMPTS = (
    "a big red circle moving right on a striped green background",
    "a small yellow square moving up on a blue background",
    "a white triangle bouncing on a gradient purple background",
    "a blue circle growing on a black background",
)
"""Prompts the demo model knows: shapes of one colour that move."""


@dataclass(frozen=True)
class LimitOptions:
    """What a plan may cost, or how far it may err; every field is a keyword of ``search``."""

    budget: Annotated[
        float | None, option("Mean density of the sparse calls, in (0, 1] (default: 0.25).", panel=LIMIT)
    ] = None
    target_speedup: Annotated[
        float | None, option("Dense over sparse time of the attention of a whole run.", panel=LIMIT)
    ] = None
    end_to_end: Annotated[
        bool, option("Apply --target-speedup to all of denoising, not to attention.", "--end-to-end", panel=LIMIT)
    ] = False
    max_error: Annotated[float | None, option("Relative RMS error of a layer's output: 0.1 is 10 %.", panel=LIMIT)] = (
        None
    )

    @property
    def given(self) -> bool:
        """Return whether there is a limit."""
        return any(getattr(self, name) is not None for name in LIMITS)


@command
def search(
    model: Model = "demo",
    prompts: Annotated[
        Path | None,
        option("Text file with one prompt per line, like those the plan is for (default: four built-in prompts)."),
    ] = None,
    *,
    limit: LimitOptions,
    candidates: Annotated[
        str | None,
        option(
            "Methods, as in 'draft, radial, draft(density=0.1)' (default: all, at a few densities).",
            metavar="METHODS",
            panel=CANDIDATES,
        ),
    ] = None,
    preset: Annotated[
        Literal["sparse-vdit", "paro"] | None, option("Use the procedure of a paper instead.", panel=CANDIDATES)
    ] = None,
    cost_model: Annotated[
        Path | None,
        option(
            "Timings of another device: a plan searched there, or plan.scores/cost-*.json (default: time this device).",
            panel=CANDIDATES,
        ),
    ] = None,
    schedule: StepOptions,
    buckets: Annotated[
        int | None,
        option("Number of step ranges with methods of their own (default: 3).", callback=COUNT, panel=ATTENTION),
    ] = None,
    samples: Annotated[
        int | None, option("Number of steps to score in each step range (default: 1).", callback=COUNT, panel=ATTENTION)
    ] = None,
    kernel: KernelOptions,
    video: VideoOptions,
    seed: Annotated[
        int, option("Seed of the first prompt's noise; each further prompt adds 1.", callback=SEED, panel=VIDEO)
    ] = 0,
    machine: MachineOptions,
    output: Annotated[Path, option("Plan file to write.", "--output", "-o", panel=OUTPUT)] = Path("plan.json"),
    folder: Annotated[
        Path | None,
        option(
            "Where scores are kept, to resume from (default: beside the plan); not with paro.",
            panel=OUTPUT,
        ),
    ] = None,
    out: OutputOptions,
) -> None:
    """Find the method and parameters of every layer and head with the least error within a limit, and write a plan.

    One dense video is made for each prompt, and all candidates are scored beside it at some steps.
    After an interruption the same command resumes from the scores so far. Another limit needs no new scores.
    """
    from ..generation.jobs import read_prompts
    from ..generation.video import check_folder, check_target
    from .apart import check_apart, plan_files

    texts = None if prompts is None else read_prompts(None, prompts)
    check_target(output, (".json",))
    listed = _check_request(limit, candidates, preset, cost=cost_model, folder=folder)
    if folder is None and preset != "paro":  # which keeps no scores
        folder = output.with_suffix(".scores")
    if folder is not None:
        check_folder(folder, new=True, option="--folder")

    from ..generation.sources import DEMO, find_model
    from ..plans.stored_methods import masks_name
    from ..search.cost import CostModel
    from ..search.search import PROMPTS, check_seed

    with as_input_error():
        if preset == "paro":  # masks go beside the plan
            masks_name(output, "0" * 64)
    steps, computing = schedule.read(), kernel.read()
    with as_input_error():
        times = None if cost_model is None else CostModel.load(cost_model)
    machine.check()
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

    screen = out.screen()
    with screen.working(), out.quiet_libraries():
        bar = screen.start("loading")
        pipeline = machine.load(source)
        bar.finish()
        arguments = call_arguments(pipeline, source, video.arguments())
        check_sizes(pipeline, arguments)
        start = time.perf_counter()
        with as_input_error(), _kept(folder, screen), screen.stages(STAGES) as progress:
            from ..search.search import search as find

            plan = find(
                pipeline,
                texts,
                **vars(limit),
                candidates=listed,
                preset=preset,
                sampling=_sampling(pipeline, preset, limit, steps, buckets=buckets, per_bucket=samples),
                arguments=arguments,
                seed=seed,
                **computing,
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
            "dtype": machine.describe()["dtype"],
            "search_seconds": time.perf_counter() - start,
            **about(plan),
            "versions": versions(),
        }
    screen.result(value, expected_table(value, output.name), methods_table(value))


def _check_request(limit: LimitOptions, candidates: str | None, preset: str | None, **others: Any) -> list[str] | None:
    """Check what can be checked without a model, and return the candidates that are named."""
    from ..search.allocation import Target
    from ..search.candidates import make_candidates, split_candidates
    from ..search.search import check_preset

    if candidates is not None and preset is not None:
        raise InputError(f"the preset {preset} has its own candidates: leave out --preset or --candidates")
    listed = None if candidates is None else split_candidates(candidates)
    with as_input_error():
        make_candidates(listed)
        check_preset(preset, [getattr(limit, name) for name in LIMITS], **others)
        if limit.end_to_end or limit.given:
            Target(limit.budget, limit.target_speedup, limit.max_error, limit.end_to_end)
    return listed


def _sampling(
    pipeline: Any, preset: str | None, limit: LimitOptions, schedule: dict[str, Any], **own: int | None
) -> Sampling:
    from ..search.search import default_sampling

    default = default_sampling(pipeline, preset, limited=limit.given)
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    return replace(default, schedule=replace(default.schedule, **schedule), **given)


@contextlib.contextmanager
def _kept(folder: Path | None, screen: Screen) -> Any:
    """Name the folder of scores after a failure."""
    try:
        yield
    except BaseException:
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            screen.note(f"the scores so far are in {folder}; run the same command to resume")
        raise
