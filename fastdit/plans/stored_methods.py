"""Methods in a plan file: their fields as JSON, and calibrated masks in files beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..attention import AttentionMethod, get_method
from ..attention.methods.paro.masks import ParoPlan
from ..files import LONGEST_NAME, cut
from ..validation import Part, shown
from .schema import PlanError, check_plain, validated

_WORD = "[a-z0-9_]{1,32}"
"""A text in a field is one of the method's options, never a path: a plan opens no file but those beside it."""
_BESIDE = r"^[^/\\:.\x00][^/\\:\x00]{0,200}\.safetensors$"


class StoredMethod(Part):
    """A method as a plan file has it.

    Args:
        method: Its name.
        fields: Its fields.
    """

    method: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    fields: dict[str, Any]


class _StoredMasks(Part):
    file: Annotated[str, Field(pattern=_BESIDE)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def method_to_json(method: AttentionMethod, place: str, path: Path) -> dict[str, Any]:
    """Return a method as JSON values, and write its masks beside the plan.

    Args:
        method: The method.
        place: Where it is in the plan, for errors.
        path: The file of the plan.

    Raises:
        PlanError: A field holds what no file can.
    """
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    for name, value in fields.items():
        if isinstance(value, ParoPlan):
            fields[name] = _save_masks(value, path)
        else:
            check_plain(value, f"{place}.fields.{name}", 2, _WORD)
    return {"method": method.name, "fields": fields}


def method_from_json(stored: StoredMethod, place: str, folder: Path) -> AttentionMethod:
    """Make a method of JSON values.

    Args:
        stored: The values.
        place: Where they are in the plan, for errors.
        folder: Where masks lie.

    Raises:
        PlanError: There is no such method, a value is wrong, or masks are missing or others than they were.
    """
    fields = dict(stored.fields)
    for name, value in fields.items():
        where = f"{place}.fields.{name}"
        if isinstance(value, dict):
            fields[name] = _load_masks(validated(_StoredMasks, value, where), where, folder)
        else:
            check_plain(value, where, 2, _WORD)
    try:
        return get_method(stored.method, **fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise PlanError(f"{place} makes no sense: {error}") from error


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
    if re.fullmatch(_BESIDE, name) is None:
        raise PlanError(
            f"the masks of the plan would be named {shown(name)}, which must be a plain name; give the plan another one"
        )
    return name


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


def _load_masks(masks: _StoredMasks, place: str, folder: Path) -> ParoPlan:
    file = folder / masks.file
    try:
        if not file.is_file():
            raise PlanError(f"{place} names {file.name}, which is not beside the plan; copy it there")
        if _digest(file) != masks.sha256:
            raise PlanError(f"{place} names {file.name}, but that file has changed since the plan was written")
        return ParoPlan.load(str(file))
    except PlanError:
        raise
    except (OSError, ValueError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"{place} names {file.name}, which cannot be used: {error}") from error


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
