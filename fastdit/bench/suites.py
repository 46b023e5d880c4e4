"""The jobs of each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..generation.errors import InputError, as_input_error
from ..search.search import check_seed
from .conditions import Conditions
from .e2e import e2e_jobs
from .inputs.capture import capture
from .inputs.problems import Problem, find_problems
from .inputs.settings import DEFAULT, Setting, find_settings
from .inputs.synthetic import KINDS, Sample, synthetic
from .jobs import Job
from .kernels import kernel_jobs
from .measuring.contenders import Contender, contenders
from .measuring.measure import throughput
from .methods import method_jobs
from .model import REST, Model, open_studio, open_subject
from .quality import quality_jobs
from .random_models import MODELS, model_of, problem_outline, random_subject

MATCHING = 4
"""Approximate number of dense calls that matching a density takes."""

KINDS_OF_STEPS = 3
"""Approximate number of steps of a run with random weights."""

PROMPT = 'one with --prompt "..."'
"""How to pass a prompt where one is enough."""

SDPA = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
"""Dense attention measured beside all else."""

PUBLISHED = ("default", "draft", "adaspa", "sla", "radial", "paro", "sparse-vdit")
"""The default, and every method as published."""


def build_kernels(
    session: Conditions,
    problems: Sequence[str],
    densities: Sequence[float],
    blocks: tuple[int, int],
    repeats: int,
    only: Sequence[str] | None = None,
) -> list[Job]:
    """Make the jobs of ``kernels``.

    Args:
        session: Conditions of the run.
        problems: Names of the problems.
        densities: Fractions of the blocks, each in (0, 1].
        blocks: Queries and keys in a block.
        repeats: Smallest number of rounds.
        only: Names of the contenders; ``None`` for all.

    Raises:
        InputError: There is no such problem or contender.
    """
    with as_input_error():
        chosen = find_problems(problems)
    return kernel_jobs(
        chosen,
        _contenders(only),
        densities=densities,
        blocks=blocks,
        dtype=session.dtype,
        device=session.device,
        seed=session.seed,
        repeats=repeats,
        throughput=throughput(session.device),
    )


def build_methods(
    session: Conditions,
    sources: Sequence[str],
    settings: Sequence[Setting],
    densities: Sequence[float],
    model: Model | None = None,
    prompt: str | None = None,
) -> list[Job]:
    """Make the jobs of ``methods``.

    Args:
        session: Conditions of the run.
        sources: Problems with synthetic calls.
        settings: The settings.
        densities: Fractions of the pairs, each in (0, 1].
        model: A pipeline whose calls are captured.
        prompt: Prompt of the captured calls.

    Raises:
        InputError: There is no such problem.
    """
    with as_input_error():
        problems = find_problems(sources)
        check_seed(session.seed, 2)
    device = session.device
    jobs = []
    for problem in problems:
        one = partial(synthetic, problem.tokens, head_dim=max(32, problem.head_dim), dtype=session.dtype, device=device)
        seconds = len(KINDS) / problem.heads * problem.flops * MATCHING / throughput(device)
        jobs += method_jobs(
            f"synthetic {problem.name}",
            lambda one=one: [one(seed=session.seed)],
            lambda one=one: [one(seed=session.seed + 1)],
            settings,
            densities=densities,
            about={"problem": problem.describe()},
            target=partial(problem_outline, problem),
            seconds=seconds,
        )
    if model is not None:
        texts = model.prompts(None if prompt is None else [prompt], PROMPT)
        jobs += _captured(session, model, texts[:2], settings, densities)
    return jobs


def _captured(
    session: Conditions, model: Model, prompts: Sequence[str], settings: Sequence[Setting], densities: Sequence[float]
) -> list[Job]:
    learned = prompts[-1], session.seed + 1
    studio = cache(partial(open_studio, session, model, learned, None))

    def calls(prompt: str, seed: int) -> list[Sample]:
        made = studio()
        found = capture(made.pipeline, lambda: made.make(prompt, seed), made.calibration_steps, every_layer=False)
        # a plan is for a whole model: here the model is this one layer at one step
        alone = {"layer": 0, "num_layers": 1, "step": 0, "num_steps": 1}
        return [replace(sample, call=replace(sample.call, **alone)) for sample in found]

    seconds = model.seconds(session)
    return method_jobs(
        f"captured {model.label}",
        lambda: calls(prompts[0], session.seed),
        lambda: calls(*learned),
        settings,
        densities=densities,
        about={"model": model.label, "prompt": prompts[0], **model.about()},
        target=lambda: studio().pipeline,
        seconds=None if seconds is None else seconds / 50,
    )


def build_quality(
    session: Conditions,
    model: Model,
    prompts: Sequence[str],
    count: int | None,
    seeds: int,
    settings: Sequence[Setting],
    densities: Sequence[float],
    folder: Path | None,
) -> list[Job]:
    """Make the jobs of ``quality``.

    Args:
        session: Conditions of the run.
        model: The pipeline.
        prompts: The prompts that there are.
        count: How many of them are compared, at least 1; ``None`` for all.
        seeds: Seeds of each, at least 1.
        settings: The settings.
        densities: Fractions of the pairs of sparse calls, each in (0, 1].
        folder: Where videos go; ``None`` keeps none.

    Raises:
        InputError: There are not as many seeds after the first.
    """
    with as_input_error():
        check_seed(session.seed, seeds + 1)  # the last one is of the video that is learned from
    compared = prompts[:count]
    # the last one that is not compared, or a video of the first with noise of its own
    learned = next((prompt for prompt in reversed(prompts) if prompt not in compared), prompts[0])
    return quality_jobs(
        partial(open_studio, session, model, (learned, session.seed + seeds), folder),
        compared,
        range(session.seed, session.seed + seeds),
        settings,
        densities=densities,
        model=model.label,
        about=model.about(),
        seconds=model.seconds(session),
        others=[row["prompt"] for row in session.rows if "prompt" in row],
    )


def build_e2e(
    session: Conditions,
    settings: Sequence[Setting],
    densities: Sequence[float],
    repeats: int,
    model: Model | None,
    problems: Sequence[str] = (),
    prompt: str | None = None,
) -> list[Job]:
    """Make the jobs of ``e2e``.

    Args:
        session: Conditions of the run.
        settings: The settings.
        densities: Fractions of the pairs of sparse calls, each in (0, 1]; none for settings that need none.
        repeats: Rounds after the cold one, at least 1.
        model: A pipeline with its weights; ``None`` for none.
        problems: Names of real configurations that get random weights.
        prompt: What the pipeline makes.

    Raises:
        InputError: There is no such problem, or a setting has no density.
    """
    with as_input_error():
        chosen = find_problems(problems)
    vague = [s.name for s in settings if not (densities or s.is_fixed or s.method == DEFAULT)]
    if vague:
        raise InputError(f"{vague[0]} needs a density; pass --densities 0.2")
    how: dict[str, Any] = {"densities": densities, "repeats": repeats}
    jobs = []
    if model is not None:
        text = model.prompts(None if prompt is None else [prompt], PROMPT)[0]
        load = partial(open_subject, session, model, text)
        seconds = model.seconds(session)
        jobs += e2e_jobs(model.label, load, settings, about=model.about(), seconds=seconds, **how)
    for problem in chosen:
        jobs += _random(session, problem, settings, how)
    return jobs


def _random(session: Conditions, problem: Problem, settings: Sequence[Setting], how: dict[str, Any]) -> list[Job]:
    if model_of(problem) is None:
        raise InputError(f"no configuration for {problem.name}; choose from: {', '.join(MODELS)}")
    load = partial(random_subject, problem, dtype=session.dtype, device=session.device, seed=session.seed)
    seconds = KINDS_OF_STEPS * REST * problem.flops * problem.layers * problem.passes / throughput(session.device)
    about = {"problem": problem.describe()}
    return e2e_jobs(f"{problem.name}, random weights", load, settings, about=about, seconds=seconds, **how)


def _contenders(only: Sequence[str] | None) -> list[Contender]:
    known = {contender.name: contender for contender in contenders()}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise InputError(f"unknown contender {unknown[0]!r}; there are: {', '.join(known)}")
    if only is None:
        return list(known.values())
    beside = () if any(name.startswith("sdpa-") for name in only) else SDPA
    return [known[name] for name in dict.fromkeys((*beside, *only))]


def build_everything(session: Conditions, *, quick: bool) -> list[Job]:
    """Make the jobs of all benchmarks.

    Args:
        session: Conditions of the run.
        quick: Whether the whole takes minutes on two cores.
    """
    demo = Model.find("demo")
    prompts = demo.prompts(None, "")
    folder = session.output.with_suffix(".videos")
    if quick:
        return [
            *build_kernels(session, ["demo"], (0.1, 0.2, 0.5), (64, 64), 3),
            *build_methods(session, ["9x16x24/2x64"], find_settings(None), (0.1, 0.2, 0.3)),
            *build_quality(session, demo, prompts, 1, 1, find_settings(PUBLISHED), (0.2,), folder),
            *build_e2e(session, find_settings(["default"]), (), 1, demo),
        ]
    problems = ["demo", *(["wan-1.3b-480p", "hunyuan-720p"] if session.device.startswith("cuda") else ["ltx-2b"])]
    every, densities = find_settings(None, means=True), (0.05, 0.1, 0.2, 0.3, 0.5)
    return [
        *build_kernels(session, problems, densities, (64, 64), 7),
        *build_methods(session, ["9x16x24/2x64", "demo"], every, densities, demo),
        *build_quality(session, demo, prompts, 12, 1, find_settings(PUBLISHED, means=True), (0.1, 0.2, 0.3), folder),
        *build_e2e(session, find_settings(["default"]), (0.1, 0.2, 0.3), 3, demo),
    ]
