"""Method benchmark: error against dense attention at equal density, on synthetic or captured calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionMethod, MethodState
from ..search.scoring import head_density, known_pattern, sampled_recall
from .inputs.settings import Setting
from .inputs.synthetic import Sample
from .jobs import Job, Outcome
from .report.result_store import Row

Samples = Callable[[], Sequence[Sample]]
"""Makes calls when they are first needed; all of one source."""


def method_jobs(
    source: str,
    measured: Samples,
    calibration: Samples,
    settings: Sequence[Setting],
    *,
    densities: Sequence[float],
    about: dict[str, Any],
    target: Callable[[], Any],
    seconds: float | None = None,
) -> list[Job]:
    """Make a job for each density, and one for settings that say it themselves: each on every call of a source.

    Args:
        source: What the calls are, in a word or two.
        measured: The calls that errors are measured on.
        calibration: Other calls of the same kind, from which densities are matched and plans calibrated.
        settings: The settings.
        densities: Fractions of the pairs, each in (0, 1].
        about: What rows say of the source.
        target: Makes the model of the calls, or its outline, which decides what the default is.
        seconds: Estimate of one setting at density 1; ``None``: no estimate.
    """
    shared = cache(lambda: (measured(), calibration()))
    model = cache(target)

    def job(chosen: Sequence[Setting], density: float | None) -> Job:
        parts = {setting.name: setting for setting in chosen}
        return Job(
            "methods",
            source if density is None else f"{source} @{density:g}",
            tuple(parts),
            partial(_measure, shared, model, parts, density),
            None if seconds is None else seconds * len(parts) * (1 + (density or 0.0)),
            {"source": source, "asked": density, **about},
            len(parts),
        )

    fixed = [setting for setting in settings if setting.is_fixed]
    turned = [setting for setting in settings if not setting.is_fixed]
    jobs = [job(turned, density) for density in densities] if turned else []
    return [*jobs, job(fixed, None)] if fixed else jobs


@torch.no_grad()
def _measure(
    shared: Callable[[], tuple[Sequence[Sample], Sequence[Sample]]],
    target: Callable[[], Any],
    parts: dict[str, Setting],
    density: float | None,
    todo: Collection[str],
    advance: Callable[[], None],
) -> Outcome:
    outcome = Outcome()
    measured, calibration = shared()
    for part in todo:
        setting = parts[part].of_model(target())
        method = setting.at(density, lambda _: calibration)
        if not isinstance(method, AttentionMethod):
            outcome.absent[part] = method if isinstance(method, str) else "a plan is for a whole model"
            continue
        results = [measure_call(method, sample) for sample in measured]
        wrong = [each["fault"] for each in results if "fault" in each]
        if wrong:
            outcome.faults[part] = wrong[0]
        else:
            outcome.rows[part] = {"setting": setting.describe(method, setting.schedule), **_mean(results, measured)}
        advance()
    return outcome


def measure_call(method: AttentionMethod, sample: Sample) -> Row:
    """Compare a method with dense attention on one call.

    Args:
        method: The method.
        sample: The call.

    Returns:
        ``density``, ``recall`` (``None`` where the output is not that of a pattern) and ``error``, the relative L2
        error of the output, all means over heads; ``heads``: the errors of each; seconds of the first call of a video,
        of a later one with the blocks that are there, those of it for the order of tokens, and of choosing blocks anew
        in between, 0 for a static pattern. ``fault`` instead, if an output is not finite.
    """
    q, k, v, call = sample.q, sample.k, sample.v, sample.call
    state = MethodState()
    dense = sample.dense()

    def run() -> tuple[Tensor, float, dict[str, float]]:
        spent = {"choice": 0.0, "order": 0.0}

        def clocked(part: str, device: torch.device, run: Callable[[], Any]) -> Any:
            begin = _now(device)
            out = run()
            spent[part] += _now(device) - begin
            return out

        state.measure = clocked
        begin = _now(q.device)
        out = method.forward(q, k, v, call, state)
        return out, _now(q.device) - begin, spent

    _, first, _ = run()
    choice = 0.0
    if not method.static:
        choice = run()[2]["choice"]
        state.refresh = False
    # Timed after the first call, which may be dense and teach the method what later calls skip.
    out, seconds, spent = run()
    if out.shape != q.shape or not torch.isfinite(out).all():
        return {"fault": f"{sample.name}: the output has NaN or Inf, or the wrong shape"}
    pattern = known_pattern(method, q, k, call, state)
    heads = sample.errors(out, dense)
    return {
        "density": float(head_density(pattern, call, state, q.shape[1]).mean()),
        "recall": None if pattern is None else float(sampled_recall(q, k, pattern, call).mean()),
        "error": sum(heads) / len(heads),
        "heads": heads,
        "first_seconds": first,
        "call_seconds": seconds,
        "choice_seconds": choice,
        "order_seconds": spent["order"],
    }


def _mean(results: Sequence[Row], samples: Sequence[Sample]) -> Row:
    out: Row = {"calls": len(results)}
    for name in ("density", "recall", "error", "first_seconds", "call_seconds", "choice_seconds", "order_seconds"):
        values = [each[name] for each in results]
        out[name] = None if None in values else sum(values) / len(values)
    out["first"], out["choice"] = (out[name] / out["call_seconds"] for name in ("first_seconds", "choice_seconds"))
    heads = Tensor([each["heads"] for each in results]).mean(0).tolist()
    kinds = samples[0].kinds or tuple(f"head {i}" for i in range(len(heads)))
    out["heads"] = dict(zip(kinds, heads, strict=True))
    return out


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
