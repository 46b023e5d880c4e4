"""Times of the unattended GPU run, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdit.bench.jobs import Outcome
from fastdit.bench.measuring.contenders import failure
from fastdit.bench.measuring.measure import extra_memory, interleaved


def times_of(runs: dict[str, Callable[[], Any]], device: str, repeats: int, advance: Callable[[], None]) -> Outcome:
    """Time runs in turn, and measure their memory; one that crashes is a fault.

    Args:
        runs: What is timed, by its part.
        device: Where it runs.
        repeats: Rounds at least.
        advance: Is called after each round.
    """
    memory, faults = {}, {}
    for part, run in runs.items():
        try:
            run()
            memory[part] = extra_memory(run, device)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the others are timed
            faults[part] = failure(error)
    sound = {part: run for part, run in runs.items() if part in memory}
    times = interleaved(sound, device, repeats=repeats, advance=advance)
    rows = {
        part: {"seconds": t.seconds, "seconds_spread": t.spread, "repeats": len(t.samples), "extra_bytes": memory[part]}
        for part, t in times.items()
    }
    return Outcome(rows, faults=faults)
