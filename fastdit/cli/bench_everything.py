"""What ``fastdit bench all`` runs."""

from __future__ import annotations

from ..bench.jobs import Job
from ..bench.settings import find_settings
from .bench_build import build_e2e, build_kernels, build_methods, build_quality
from .bench_model import Model
from .bench_session import Session

FEW = ("draft-4x4x4", "adaspa-tile", "sla-tile", "radial-tile", "paro")
"""The best known setting of each published method that chooses blocks, for videos on a small machine."""


def build_everything(session: Session, *, quick: bool) -> list[Job]:
    """Make the jobs of all benchmarks.

    Args:
        session: What was asked for.
        quick: Whether they shall take minutes on two cores.
    """
    demo = Model.find("demo")
    on_gpu = session.device.startswith("cuda")
    problems = ["demo"] if quick else ["demo", *(["wan-1.3b-480p", "hunyuan-720p"] if on_gpu else ["ltx-2b"])]
    densities = (0.1, 0.2, 0.5) if quick else (0.05, 0.1, 0.2, 0.35, 0.5)
    sizes = ["8x16x16/2x64", "demo"]
    every, few = find_settings(None, means=not quick), find_settings(FEW, means=not quick)
    folder = session.output.with_suffix(".videos")
    some = (0.2,) if quick else (0.1, 0.2, 0.35, 0.5)
    best = find_settings(["draft-4x4x4"], means=True)
    return [
        *build_kernels(session, problems, densities, (64, 64), 3 if quick else 7),
        *build_methods(session, sizes[:1] if quick else sizes, every, densities, demo),
        *build_quality(session, demo, demo.prompts(None, 2 if quick else 12), 1, few, some, folder),
        *build_e2e(session, best[:1] if quick else best, some, 1 if quick else 3, demo),
    ]
