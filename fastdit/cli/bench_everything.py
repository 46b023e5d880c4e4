"""What ``fastdit bench all`` runs."""

from __future__ import annotations

from ..bench.jobs import Job
from ..bench.settings import find_settings
from .bench_build import build_e2e, build_kernels, build_methods, build_quality
from .bench_model import Model
from .bench_session import Session

PUBLISHED = ("default", "draft", "adaspa", "sla", "radial", "paro", "sparse-vdit")
"""What users get, and every method as its paper has it."""


def build_everything(session: Session, *, quick: bool) -> list[Job]:
    """Make the jobs of all benchmarks.

    Args:
        session: What was asked for.
        quick: Whether they shall take minutes on two cores.
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
