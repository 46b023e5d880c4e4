"""``fastdit info``: what is installed, and what can run here."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..generation.errors import InputError, as_input_error
from .console import NOT_MEASURED, Screen, add_row, guarded, plain_table


@guarded
def info(
    model: Annotated[
        str | None,
        typer.Option(
            help="Show what this model runs by default, and why: demo, a folder, or a hub id.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write it to stdout as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Show versions, devices, kernels and why they cannot run, model families, and methods with their fields."""
    screen = Screen(as_json=as_json)
    with screen.working():
        value = _collect() if model is None else _defaults(model)
    screen.result(value, *(_tables(value) if model is None else [_default_table(value)]))


def _defaults(model: str) -> dict[str, Any]:
    from ..defaults import choose
    from ..generation.loading import outline, quiet_libraries
    from ..generation.sources import find_model

    with quiet_libraries(), as_input_error():
        choice = choose(outline(find_model(model)))
    return {
        "model": model,
        "methods": {title: {"name": method.name, **method.describe()} for title, method in choice.methods.items()},
        "schedule": dataclasses.asdict(choice.schedule),
        "precision": choice.precision,
        "reason": choice.reason,
        "source": choice.source,
    }


def _default_table(value: dict[str, Any]) -> Table:
    table = plain_table(value["model"], "setting", "value", numbers=False)
    for title, method in {**value["methods"], "schedule": {"name": "", **value["schedule"]}}.items():
        add_row(table, title, method["name"])
        for field, setting in method.items():
            if field == "name":
                continue
            # of a plan: the share of every method
            shares = [f"{share:.1%} {label}" for label, share in setting.items()] if type(setting) is dict else None
            add_row(table, f"  {field}", "\n".join(shares) if shares else str(setting))
    for name in ("precision", "reason", "source"):
        add_row(table, name, value[name] or "that of the model")
    return table


def _collect() -> dict[str, Any]:
    import fastdit

    from ..attention.kernels.dispatch import explain_kernels
    from ..generation.report import versions

    return {
        "versions": versions(),
        "devices": _devices(),
        "ffmpeg": _ffmpeg(),
        "kernels": explain_kernels(),
        "families": list(fastdit.list_families()),
        "methods": {name: _fields(name) for name in fastdit.list_methods()},
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "name": f"{torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory // 2**20
        found.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "memory_mib": memory,
                "compute_capability": f"{about.major}.{about.minor}",
            }
        )
    return found


def _ffmpeg() -> str | None:
    from ..generation.video import check_ffmpeg

    try:
        return check_ffmpeg()
    except InputError:
        return None


def _fields(name: str) -> list[dict[str, Any]]:
    from ..attention import method_class

    cls = method_class(name)
    kinds = typing.get_type_hints(cls)
    return [
        {"name": field.name, "type": _spell(kinds[field.name]), "default": getattr(cls, field.name, None)}
        for field in dataclasses.fields(cls)
    ]


def _spell(kind: Any) -> str:
    return kind.__name__ if type(kind) is type else str(kind)


def _tables(value: dict[str, Any]) -> list[Table]:
    installed = plain_table("versions", "package", "version", numbers=False)
    for package, number in value["versions"].items():
        add_row(installed, package, number or "not installed")
    add_row(
        installed,
        "ffmpeg",
        Path(value["ffmpeg"]).name if value["ffmpeg"] else "none that can write videos: fastdit generate says why",
    )

    devices = plain_table("devices", "device", "name", "memory", "capability", numbers=False)
    for about in value["devices"]:
        memory = f"{about['memory_mib'] / 1024:.1f} GiB" if "memory_mib" in about else NOT_MEASURED
        add_row(devices, about["device"], about["name"], memory, about.get("compute_capability", NOT_MEASURED))

    kernels = plain_table("kernels", "kernel", "here", numbers=False)
    for name, reason in value["kernels"].items():
        add_row(kernels, name, "can run" if reason is None else f"cannot run: {reason}")

    families = plain_table("models", "family")
    for name in value["families"]:
        add_row(families, name)

    methods = plain_table("methods", "method", "field", "type", "default", numbers=False)
    for name, known in value["methods"].items():
        rows = [(field["name"], field["type"], str(field["default"])) for field in known] or [("-", "", "")]
        for i, row in enumerate(rows):
            add_row(methods, name if i == 0 else "", *row, end_section=i == len(rows) - 1)
    return [installed, devices, kernels, families, methods]
