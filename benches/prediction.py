"""Compare what a plan is expected to save of the time of self-attention with what it saves, in one run.

``python -m benches.prediction PLAN -o FILE`` times the plan's candidates, as a search does, and the demo model, dense
and with the plan, in turn.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

import fastdit
from fastdit.bench.report.result_store import environment
from fastdit.demo import DEFAULTS, load_pipeline
from fastdit.plans.plan import Plan, TransformerPlan
from fastdit.schedule import step_bucket
from fastdit.search.cost import CostModel, measure_cost
from fastdit.search.scores import Shape

PROMPT = "a green square moving up on a blue background"


def expected_speedup(plan: Plan, found: TransformerPlan, model: CostModel) -> float:
    """Return the self-attention time of a dense run over that of a plan, as a cost model has it.

    Args:
        plan: The plan.
        found: What it has for the transformer.
        model: Times of the plan's candidates, for calls of its size.
    """
    dense, total = found.heads * float(model.seconds(0, 1.0)), 0.0
    for layer in range(found.layers):
        steps = _sparse_steps(plan, layer, found.layers)
        total += dense * (plan.steps - sum(map(len, steps)))
        for bucket, own in enumerate(steps):
            times = {
                "calls": max(1, len(own)),
                "refreshes": max(1, sum(plan.schedule.refreshes(step, plan.steps) for step in own)),
            }
            for head in range(found.heads):
                index, density = found.choices[bucket][layer][head], found.densities[bucket][layer][head]
                total += len(own) * float(model.seconds(index, density, **times))
    return dense * plan.steps * found.layers / total


def _sparse_steps(plan: Plan, layer: int, layers: int) -> list[list[int]]:
    buckets: list[list[int]] = [[] for _ in plan.buckets]
    for step in range(plan.steps):
        if plan.schedule.dense_reason(layer, layers, step, plan.steps) is None:
            buckets[step_bucket(plan.buckets, step, plan.steps)].append(step)
    return buckets


def _attention_seconds(pipe: Any, method: Any, steps: int) -> float:
    values = {name: value for name, value in asdict(DEFAULTS).items() if name != "fps"}
    with fastdit.sparse_attention(pipe, method) as handle:
        seed = torch.Generator().manual_seed(0)
        pipe(PROMPT, **{**values, "num_inference_steps": steps}, generator=seed, output_type="latent")
        return handle.attention_seconds


def main(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of the demo model.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the result.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed; medians count.")] = 3,
) -> None:
    """Compare what a plan is expected to save of the time of self-attention with what it saves.

    Args:
        plan_file: The plan, of the demo model.
        output: JSON file for the result.
        rounds: How often everything is timed, at least 1.
    """
    plan, pipe = Plan.load(plan_file), load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    (found,) = plan.transformers.values()
    shape = Shape(found.layers, found.heads, found.head_dim, 1, plan.tokens, "float32", "cpu")
    expected, measured = [], []
    _attention_seconds(pipe, "dense", plan.steps)
    for _ in track(range(rounds), "timing"):
        expected.append(expected_speedup(plan, found, measure_cost(plan.candidates, shape)))
        dense = _attention_seconds(pipe, "dense", plan.steps)
        measured.append(dense / _attention_seconds(pipe, plan, plan.steps))
    row = {
        "plan": plan_file.name,
        "in_plan": plan.speedup,
        "expected": statistics.median(expected),
        "measured": statistics.median(measured),
        "rounds": {"expected": expected, "measured": measured},
        "run": environment("cpu", 0),
    }
    row["off"] = row["expected"] / row["measured"] - 1
    Console().print(f"expected {row['expected']:.2f}x, measured {row['measured']:.2f}x: {row['off']:+.0%}")
    if output is not None:
        output.write_text(json.dumps(row) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
