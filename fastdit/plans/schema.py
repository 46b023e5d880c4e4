"""JSON files of plans: strict reading, readable writing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from ..validation import MAX_NUMBER, describe_error, join, shown

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 16 << 20
"""Size of the largest file that is read."""


class PlanError(ValueError):
    """Say what is wrong with a plan, and where."""


def validated(kind: type[M], value: Any, place: str = "") -> M:
    """Return JSON values as a model.

    Args:
        kind: The model.
        value: The values.
        place: Where they are in the plan; empty for the whole.

    Raises:
        PlanError: A value is wrong, missing or unknown.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise PlanError(describe_error(error, place)) from error


def check_plain(value: Any, place: str, depth: int, text: str = r"[^\ud800-\udfff]*") -> None:
    """Check JSON values that have no model: numbers, texts, lists and objects.

    Args:
        value: The values.
        place: Where they are in the plan.
        depth: Levels of lists and objects allowed, at least 0.
        text: Regular expression that every text matches.

    Raises:
        PlanError: Something else is in it, or it has too many levels.
    """
    if isinstance(value, (list, tuple, dict)):
        if depth == 0:
            raise PlanError(f"{place} must be less deep, got {shown(value)}")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(inner, join(place, key), depth - 1, text)
    elif isinstance(value, str):
        if re.fullmatch(text, value) is None:
            raise PlanError(f"{place} must match pattern {text!r}, got {shown(value)}")
    elif value is not None and not (isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER):
        raise PlanError(f"{place} must be a number, got {shown(value)}")


def read_json(path: Path) -> Any:
    """Read a JSON file strictly: no NaN, no name twice, nothing too large.

    Args:
        path: The file.

    Raises:
        PlanError: It cannot be read, or is no such JSON.
    """
    try:
        if not path.is_file():
            raise PlanError(f"there is no file {path}" if not path.exists() else f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise PlanError(f"{path} has more than {MAX_BYTES >> 20} MiB, which is no plan")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}") from error


def write_json(value: Any) -> str:
    """Return JSON for people to read: names in order, a list of numbers in one line.

    Args:
        value: Objects, lists, texts and finite numbers.
    """
    return "".join(_lines(value, "")) + "\n"


def _lines(value: Any, indent: str) -> Iterator[str]:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        for index, name in enumerate(sorted(value)):
            yield f"{',' if index else '{'}\n{inner}{json.dumps(name, ensure_ascii=False)}: "
            yield from _lines(value[name], inner)
        yield f"\n{indent}}}"
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, dict, str)) for item in value):
        for index, item in enumerate(value):
            yield f"{',' if index else '['}\n{inner}"
            yield from _lines(item, inner)
        yield f"\n{indent}]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
