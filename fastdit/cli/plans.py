"""What is in a plan, as JSON values and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .screen import add_row, number, plain_table

if TYPE_CHECKING:
    from ..search.plan import Plan

EXACT, PERCENT = "{:.3f}", "{:.1%}"


def about(plan: Plan) -> dict[str, Any]:
    """Return what a plan is for, what is expected of it, and what it chooses how often.

    Args:
        plan: The plan.
    """
    from ..search.views import bucket_names, chosen

    return {
        "density": plan.density,
        "speedup_attention": plan.speedup,
        "error": plan.error,
        "transformers": {
            title: {"model_class": found.model_class, "layers": found.layers, "heads": found.heads}
            for title, found in plan.transformers.items()
        },
        "grid": list(plan.tokens.grid.shape),
        "text_tokens": plan.tokens.text_tokens,
        "steps": plan.steps,
        "scheduler": plan.scheduler,
        "guidance": plan.guidance,
        "schedule": asdict(plan.schedule),
        "buckets": bucket_names(plan.buckets),
        "precision": plan.precision,
        "prompts": list(plan.prompts),
        "device": plan.cost_model.get("device"),
        "fastdit": plan.fastdit,
        "methods": chosen(plan),
    }


def about_table(value: dict[str, Any], name: str) -> Table:
    """Show what a plan is for.

    Args:
        value: What ``about`` returned.
        name: Above the table.
    """
    table = plain_table(name, "", "", numbers=False)
    table.show_header = False
    for title, model in value["transformers"].items():
        add_row(table, title, f"{model['model_class']}, {model['layers']} layers of {model['heads']} heads")
    text = f" and {value['text_tokens']} of text" if value["text_tokens"] else ""
    add_row(table, "tokens", f"{' x '.join(map(str, value['grid']))} (frames x height x width){text}")
    guidance = "" if value["guidance"] is None else f", guidance {value['guidance']:g}"
    add_row(table, "run", f"{value['steps']} steps of {value['scheduler']}{guidance}")
    for field, kept in value["schedule"].items():
        if kept and (field, kept) != ("refresh_steps", 1):
            listed = ", ".join(map(str, kept)) if isinstance(kept, list | tuple) else str(kept)
            add_row(table, field.replace("_", " "), listed)
    if value["precision"] is not None:
        add_row(table, "precision", value["precision"])
    add_row(table, "searched with", f"{len(value['prompts'])} prompts, times of {value['device'] or 'no device'}")
    return table


def expected_table(value: dict[str, Any], name: str) -> Table:
    """Show what is expected of a plan.

    Args:
        value: What ``about`` returned.
        name: Above the table.
    """
    table = plain_table(name, "expected", "")
    add_row(table, "density of sparse calls", number(value["density"], EXACT))
    add_row(table, "attention of the whole run, dense over sparse time", number(value["speedup_attention"], "{:.2f}x"))
    add_row(table, "relative error of a layer's output, root mean square", number(value["error"], PERCENT))
    return table


def methods_table(value: dict[str, Any]) -> Table:
    """Show what a plan chooses how often.

    Args:
        value: What ``about`` returned.
    """
    table = plain_table("methods", "method", "heads", "density", "error")
    for found in value["methods"]:
        density, error = number(found["density"], EXACT), number(found["error"], PERCENT)
        add_row(table, f"{found['index']}: {found['name']}", number(found["share"], PERCENT), density, error)
    table.caption = "errors of single heads, relative to the layer's output"
    table.caption_justify = "left"
    return table
