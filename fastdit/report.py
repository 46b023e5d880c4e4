"""Text tables for reports of sparse attention."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def summary(report: Mapping[str, Any], width: int = 120) -> str:
    """Render the report of a ``SparseAttention`` handle as text.

    The columns choice and order are the shares of sparse time spent on selecting blocks and reordering tokens.

    Args:
        report: What ``SparseAttention.report()`` returns.
        width: Columns of the text, at least 60.
    """
    table = Table(title=_title(report), title_justify="left", show_footer=True)
    totals = report["totals"]
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("sparse", str(totals["sparse_calls"]), justify="right")
    table.add_column("density", _percent(report["density"]), justify="right")
    table.add_column("seconds", _seconds(totals), justify="right")
    table.add_column("choice", _share(totals, "choice_seconds"), justify="right")
    table.add_column("order", _share(totals, "order_seconds"), justify="right")
    table.add_column("dense", _reasons(totals["dense"]))
    table.add_column("could not run sparse", _reasons(totals["fallbacks"]))
    several = len({layer["transformer"] for layer in report["layers"]}) > 1
    for layer in report["layers"]:
        name = f"{layer['transformer']}.{layer['layer']}" if several else layer["layer"]
        table.add_row(
            name,
            str(layer["sparse_calls"]),
            _percent(layer["density"]),
            _seconds(layer),
            _share(layer, "choice_seconds"),
            _share(layer, "order_seconds"),
            _reasons(layer["dense"]),
            _reasons(layer["fallbacks"]),
        )
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=False, color_system=None)
    console.print(table)
    console.print(_verdict(report), highlight=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _title(report: Mapping[str, Any]) -> str:
    methods = {title: _method(method) for title, method in report["methods"].items()}
    if len(set(methods.values())) == 1:
        return f"Sparse attention: {_method(report['method'])}"
    return "Sparse attention: " + "; ".join(f"{title}: {method}" for title, method in methods.items())


def _method(method: Mapping[str, Any]) -> str:
    set_fields = {name: value for name, value in method.items() if name != "name" and value is not None}
    fields = ", ".join(f"{name}={value}" for name, value in set_fields.items())
    return method["name"] + (f" ({fields})" if fields else "")


def _verdict(report: Mapping[str, Any]) -> str:
    if report["totals"]["calls"] == 0:
        return "No attention call so far."
    lines = [
        f"Density {_percent(report['density'])} over the sparse calls, "
        f"{_percent(report['overall_density'])} over all calls; attention took {report['attention_seconds']:.2f} s."
    ]
    lines += [
        f"Not in {report['precision']}: {count} sparse calls, because {reason}."
        for reason, count in report["totals"]["precision_fallbacks"].items()
    ]
    if report["totals"]["sparse_calls"] == 0:
        lines.append("Nothing ran sparse: see the reasons above.")
    return "\n".join(lines)


def _percent(density: float | None) -> str:
    return "-" if density is None else f"{density:.1%}"


def _seconds(entry: Mapping[str, Any]) -> str:
    return f"{entry['sparse_seconds'] + entry['dense_seconds']:.2f}"


def _share(entry: Mapping[str, Any], part: str) -> str:
    return f"{entry[part] / entry['sparse_seconds']:.1%}" if entry["sparse_seconds"] else "-"


def _reasons(reasons: Mapping[str, int]) -> str:
    return "\n".join(f"{count} {reason}" for reason, count in reasons.items())
