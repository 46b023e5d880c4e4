"""``fastdit inspect``: what is in a plan, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..generation.errors import InputError, as_input_error
from .assemble import command
from .console import Screen, add_row, number, plain_table
from .options import OUTPUT, OutputOptions, option, within
from .settings import MOST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..plans.plan import Plan


EXACT, PERCENT = "{:.3f}", "{:.1%}"
INDEX = within(0, MOST)


@command
def inspect(
    plan: Annotated[Path, typer.Argument(help="Plan written by fastdit search.", show_default=False)],
    *,
    layer: Annotated[int | None, option("Show one head: the layer it is in.", callback=INDEX)] = None,
    head: Annotated[int | None, option("Show one head: its index in the layer.", callback=INDEX)] = None,
    transformer: Annotated[str | None, option("Show one transformer, such as transformer_2 (default: all).")] = None,
    output: Annotated[
        Path | None, option("Draw pictures (.png) into this folder; needs matplotlib.", "--output", "-o", panel=OUTPUT)
    ] = None,
    out: OutputOptions,
) -> None:
    """Show what is in a plan: the method of each head, its density and its expected error."""
    if (layer is None) != (head is None):
        raise InputError("--layer and --head go together; pass both")
    if output is not None:
        _check_pictures(output, plan)
    screen = out.screen()
    with screen.working():
        from ..plans.contents import head_choices, layers
        from ..plans.plan import Plan

        with as_input_error():
            found = Plan.load(plan)
        titles = _titles(found, transformer)
        value: dict[str, Any] = {"plan": str(plan), **about(found)}
        if layer is None or head is None:
            value |= {"layers": {title: layers(found, title) for title in titles}, "head": None}
            tables = [about_table(value, plan.name), expected_table(value, "the whole plan"), methods_table(value)]
            tables += [_layer_table(title, rows) for title, rows in value["layers"].items()]
            pictures = _draw_plan(found, titles)
        else:
            place = (_only(titles), layer, head)
            _check_head(found, *place)
            about_head = {"transformer": place[0], "layer": layer, "head": head}
            value |= {"layers": None, "head": {**about_head, "buckets": head_choices(found, *place)}}
            tables = [_head_table(value["head"])]
            pictures = _draw_head(found, *place)
        value["pictures"] = [] if output is None else [str(path) for path in _save(pictures, output, screen)]
    screen.result(value, *tables)


def _check_pictures(folder: Path, plan: Path) -> None:
    from ..generation.video import check_folder
    from ..plans.plots import check_matplotlib
    from .apart import check_apart

    try:
        check_matplotlib()
    except ImportError as error:
        raise InputError(str(error)) from error
    check_folder(folder, new=True)
    if plan.suffix.lower() == ".png":  # whatever the pictures are called, one might be this
        check_apart([("a picture", folder / plan.name)], [("the plan", plan)])


def _titles(plan: Plan, asked: str | None) -> list[str]:
    titles = list(plan.transformers)
    if asked is None:
        return titles
    if asked not in titles:
        raise InputError(f"the plan does not cover {asked!r}; it covers: {', '.join(titles)}")
    return [asked]


def _only(titles: list[str]) -> str:
    if len(titles) > 1:
        raise InputError(f"the plan covers {' and '.join(titles)}; pass one with --transformer")
    return titles[0]


def _check_head(plan: Plan, title: str, layer: int, head: int) -> None:
    found = plan.transformers[title]
    for name, value, count in (("layer", layer, found.layers), ("head", head, found.heads)):
        if value >= count:
            raise InputError(f"there is no {name} {value}: the plan has {count}, counted from 0")


def _layer_table(title: str, rows: list[dict[str, Any]]) -> Table:
    sampled = _sampled(rows)
    caption = "means over step buckets; errors of the layer's output; same frame: dense attention within a frame"
    table = plain_table(title, "layer", "density", "error", *sampled, "same frame", "methods", caption=caption)
    table.columns[-1].justify = "left"
    for row in rows:
        methods = ", ".join(f"{share:.0%} {name}" for name, share in row["methods"].items())
        numbers = number(row["density"], "{:.3f}"), number(row["error"], "{:.1%}"), *_samples(row, sampled)
        add_row(table, str(row["layer"]), *numbers, number(row["same_frame"], "{:.0%}"), methods)
    return table


def _head_table(value: dict[str, Any]) -> Table:
    title = f"{value['transformer']}, layer {value['layer']}, head {value['head']}"
    sampled = _sampled(value["buckets"])
    table = plain_table(title, "steps", "method", "density", "error", *sampled, "time")
    table.columns[1].justify = "left"
    for row in value["buckets"]:
        numbers = number(row["density"], "{:.3f}"), number(row["error"], "{:.1%}"), *_samples(row, sampled)
        add_row(table, row["bucket"], row["name"], *numbers, number(1000 * row["seconds"], "{:.3g} ms"))
    return table


def _sampled(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the headings of what is known of single samples: plans of earlier versions do not say it."""
    return () if rows[0]["error_mean"] is None else ("of samples", "recall")


def _samples(row: dict[str, Any], sampled: tuple[str, ...]) -> list[str]:
    spread = f"{number(row['error_mean'], '{:.1%}')} ± {number(row['error_std'], '{:.1%}')}"
    return [spread, number(row["recall"], "{:.0%}")] if sampled else []


def _draw_plan(plan: Plan, titles: list[str]) -> Iterator[tuple[str, Figure]]:
    from ..plans import plots

    for title in titles:
        prefix = f"{title}-" if len(plan.transformers) > 1 else ""
        yield f"{prefix}methods", plots.draw_methods(plan, title)
        yield f"{prefix}density", plots.draw_numbers(plan, title, "densities")
        yield f"{prefix}error", plots.draw_numbers(plan, title, "errors")
        if plan.transformers[title].frame_mass:
            yield f"{prefix}distance", plots.draw_distances(plan, title)
    if plan.curve:
        yield "curve", plots.draw_curve(plan)


def _draw_head(plan: Plan, title: str, layer: int, head: int) -> Iterator[tuple[str, Figure | None]]:
    from ..plans import plots

    prefix = f"{title}-" if len(plan.transformers) > 1 else ""
    yield f"{prefix}layer-{layer}-head-{head}", plots.draw_head(plan, title, layer, head)


def _save(pictures: Iterator[tuple[str, Figure | None]], folder: Path, screen: Screen) -> Iterator[Path]:
    from ..files import moved_when_complete
    from ..plans.plots import save

    for name, figure in pictures:
        if figure is None:
            screen.note(f"no picture of {name}: its blocks depend on the video")
            continue
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.png"
        with moved_when_complete(path) as part:
            save(figure, part)
        screen.note(f"wrote {path}")
        yield path


def about(plan: Plan) -> dict[str, Any]:
    """Return what a plan is for, what is expected of it, and what it chooses how often.

    Args:
        plan: The plan.
    """
    from ..plans.contents import bucket_names, chosen

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
    caption = "errors of single heads, relative to the layer's output"
    table = plain_table("methods", "method", "heads", "density", "error", caption=caption)
    for found in value["methods"]:
        density, error = number(found["density"], EXACT), number(found["error"], PERCENT)
        add_row(table, f"{found['index']}: {found['name']}", number(found["share"], PERCENT), density, error)
    return table
