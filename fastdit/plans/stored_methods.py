"""Methods in a plan file: their fields as JSON, and calibrated masks in files beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from ..attention import AttentionMethod, get_method
from ..attention.methods.paro.masks import ParoPlan
from ..files import LONGEST_NAME, cut
from .schema import Item, PlanError, shown

NAME = r"[a-z][a-z0-9_]{0,63}"
WORD = r"[a-z0-9_]{1,32}"
"""A text in a field is one of the method's options, never a path: a plan opens no file but those beside it."""
BESIDE = r"[^/\\:.\x00][^/\\:\x00]{0,200}\.safetensors"


def method_to_json(method: AttentionMethod, place: str, path: Path) -> dict[str, Any]:
    """Return a method as JSON values, and write its masks beside the plan.

    Args:
        method: The method.
        place: Where it is in the plan, for errors.
        path: The file of the plan.

    Raises:
        PlanError: A field holds what no file can.
    """
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    places = {name: f"{place}.fields.{name}" for name in values}
    fields = {
        name: _save_masks(value, path) if isinstance(value, ParoPlan) else _read_option(Item(value, places[name]))
        for name, value in values.items()
    }
    return {"method": method.name, "fields": fields}


def method_from_json(item: Item, folder: Path) -> AttentionMethod:
    """Make a method of JSON values.

    Args:
        item: The values.
        folder: Where masks lie.

    Raises:
        PlanError: There is no such method, a value is wrong, or masks are missing or others than they were.
    """
    entries = item.entries(("method", "fields"))
    name = entries["method"].text(NAME, called="the name of a method")
    fields = {
        field: _load_masks(value, folder) if isinstance(value.value, dict) else _read_option(value)
        for field, value in entries["fields"].entries().items()
    }
    try:
        return get_method(name, **fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise PlanError(f"{item.place} makes no sense: {error}") from error


def _read_option(item: Item, depth: int = 2) -> Any:
    """Return the value of a field: a number, a word, or a tuple of these."""
    if isinstance(item.value, (list, tuple)) and depth > 0:
        return tuple(_read_option(inner, depth - 1) for inner in item.items())
    if isinstance(item.value, str):
        return item.text(WORD, called="an option, which is a word and never a path")
    return item.plain(1)


def masks_name(path: Path, digest: str) -> str:
    """Return the name of the file of masks that goes beside a plan.

    Args:
        path: The plan.
        digest: SHA-256 of the masks, 64 hexadecimal digits.

    Raises:
        PlanError: The name of the plan is too long for it, or has signs that a plan must not name.
    """
    name = f"{path.stem}-{digest[:16]}.safetensors"
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise PlanError(f"the masks of the plan would be named {shown(name)}, which is too long; shorten its name")
    return Item(name, "the file of the masks").text(BESIDE, called="a plain name; give the plan another one")


def _save_masks(masks: ParoPlan, path: Path) -> dict[str, str]:
    """Write masks under a name that their content gives, so that no plan that is there loses its own."""
    part = path.with_name(f".{cut(path.name, 100)}.{os.getpid()}.part")
    try:
        masks.save(str(part))
        digest = _digest(part)
        name = masks_name(path, digest)
        os.replace(part, path.with_name(name))
    finally:
        part.unlink(missing_ok=True)
    return {"file": name, "sha256": digest}


def _load_masks(item: Item, folder: Path) -> ParoPlan:
    entries = item.entries(("file", "sha256"))
    file = folder / entries["file"].text(BESIDE, called="the name of a .safetensors file beside the plan")
    expected = entries["sha256"].text(r"[0-9a-f]{64}", called="64 hexadecimal digits")
    try:
        if not file.is_file():
            raise PlanError(f"{item.place} names {file.name}, which is not beside the plan; copy it there")
        if _digest(file) != expected:
            raise PlanError(f"{item.place} names {file.name}, but that file has changed since the plan was written")
        return ParoPlan.load(str(file))
    except PlanError:
        raise
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"{item.place} names {file.name}, which cannot be used: {error}") from error


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
