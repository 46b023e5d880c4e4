"""``fastdit inspect``: what is in a plan, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from . import options
from .errors import InputError, as_input_error, guarded
from .screen import Screen, add_row, number, plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..search.plan import Plan


@guarded
def inspect(
    plan: Annotated[Path, typer.Argument(help="A plan that fastdit search has written.", show_default=False)],
    layer: Annotated[
        int | None,
        typer.Option(
            callback=options.within(0, options.MOST), help="Show only one head: that of this layer.", show_default=False
        ),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(callback=options.within(0, options.MOST), help="Which of the layer's heads.", show_default=False),
    ] = None,
    transformer: Annotated[
        str | None,
        typer.Option(help="Which of two, such as transformer_2 (default: both).", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A folder to draw pictures (.png) into; needs matplotlib.", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the numbers to stdout as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Show what is in a plan: which method each head runs, how dense it is, and which error is expected."""
    if (layer is None) != (head is None):
        raise InputError("--layer and --head name a head together: give both")
    if output is not None:
        _check_pictures(output, plan)
    screen = Screen(quiet=quiet, as_json=as_json)
    with screen.working():
        from ..search.plan import Plan
        from .plans import about, about_table, expected_table, methods_table

        with as_input_error():
            found = Plan.load(plan)
        titles = _titles(found, transformer)
        value: dict[str, Any] = {"plan": str(plan), **about(found)}
        if layer is None or head is None:
            value |= {"layers": {title: _layers(found, title) for title in titles}, "head": None}
            tables = [about_table(value, plan.name), expected_table(value, "the whole plan"), methods_table(value)]
            tables += [_layer_table(title, rows) for title, rows in value["layers"].items()]
            pictures = _draw_plan(found, titles)
        else:
            place = (_only(titles), layer, head)
            _check_head(found, *place)
            value |= {"layers": None, "head": _head(found, *place)}
            tables = [_head_table(value["head"])]
            pictures = _draw_head(found, *place)
        value["pictures"] = [] if output is None else [str(path) for path in _save(pictures, output, screen)]
    screen.result(value, *tables)


def _check_pictures(folder: Path, plan: Path) -> None:
    from ..search.plots import check_matplotlib
    from .apart import check_apart
    from .video import check_folder

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
        raise InputError(f"the plan has nothing for {asked!r}; it has: {', '.join(titles)}")
    return [asked]


def _only(titles: list[str]) -> str:
    if len(titles) > 1:
        raise InputError(f"the plan is for {' and '.join(titles)}; say which one with --transformer")
    return titles[0]


def _check_head(plan: Plan, title: str, layer: int, head: int) -> None:
    found = plan.transformers[title]
    for name, value, count in (("layer", layer, found.layers), ("head", head, found.heads)):
        if value >= count:
            raise InputError(f"there is no {name} {value}: the plan has {count}, counted from 0")


def _layers(plan: Plan, title: str) -> list[dict[str, Any]]:
    from ..search.views import layers

    return layers(plan, title)


def _head(plan: Plan, title: str, layer: int, head: int) -> dict[str, Any]:
    from ..search.views import head_choices

    return {"transformer": title, "layer": layer, "head": head, "buckets": head_choices(plan, title, layer, head)}


def _layer_table(title: str, rows: list[dict[str, Any]]) -> Table:
    sampled = _sampled(rows)
    table = plain_table(title, "layer", "density", "error", *sampled, "same frame", "methods")
    table.columns[-1].justify = "left"
    for row in rows:
        methods = ", ".join(f"{share:.0%} {name}" for name, share in row["methods"].items())
        numbers = number(row["density"], "{:.3f}"), number(row["error"], "{:.1%}"), *_samples(row, sampled)
        add_row(table, str(row["layer"]), *numbers, number(row["same_frame"], "{:.0%}"), methods)
    table.caption = "means over step buckets; errors of the layer's output; dense attention within a frame"
    table.caption_justify = "left"
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
    from ..search import plots

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
    from ..search import plots

    prefix = f"{title}-" if len(plan.transformers) > 1 else ""
    yield f"{prefix}layer-{layer}-head-{head}", plots.draw_head(plan, title, layer, head)


def _save(pictures: Iterator[tuple[str, Figure | None]], folder: Path, screen: Screen) -> Iterator[Path]:
    from ..files import moved_when_complete
    from ..search.plots import save

    for name, figure in pictures:
        if figure is None:
            screen.note(f"no picture of {name}: which blocks it computes depends on the video")
            continue
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.png"
        with moved_when_complete(path) as part:
            save(figure, part)
        screen.note(f"wrote {path}")
        yield path
