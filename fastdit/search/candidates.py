"""Candidates of a search: methods with their parameters, dense first."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ..attention import AttentionMethod, get_method, list_methods, method_class

DENSE = "dense"
PARO = "paro"

_TILE = (4, 4, 4)
_CUBES: dict[str, Any] = {"tile": _TILE, "per_row": True, "parts": 8, "compensate": "mean"}

# Fields of the candidates that a method has by default: unlike each other, so that what one head lacks another has.
# Blocks that stand in by their means are worth most where little is kept, and where a block is a tile, of the whole
# video, a frame, a row or a column, or one position in all frames. Heads that attend to everything alike are served by
# stripes alone. AdaSpa's heads do not share their blocks, because each may get another method.
_GRID: dict[str, tuple[dict[str, Any], ...]] = {
    DENSE: ({},),
    "draft": (
        {"density": 0.05, **_CUBES},
        {"density": 0.1, **_CUBES},
        {"density": 0.2, **_CUBES},
        {"density": 0.35, **_CUBES},
        {"density": 0.5, **_CUBES},
        {"density": 0.1, **_CUBES, "tile": (1, 8, 8)},
        {"density": 0.25, **_CUBES, "tile": (1, 8, 8)},
        {"density": 0.1, **_CUBES, "tile": (4, 1, 16)},
        {"density": 0.1, **_CUBES, "tile": (4, 16, 1)},
        {"density": 0.2, **_CUBES, "per_row": False},
    ),
    "adaspa": ({"density": 0.1, "order": "tile", "tile": _TILE, "adaptive": False, "compensate": "mean"},),
    "radial": ({"block_size": 64, "compensate": "mean"},),
    "diagonal": ({"density": 0.1, "compensate": "mean"},),
    "multi_diagonal": ({"density": 0.1, "compensate": "mean"},),
    "vertical_stripe": ({"density": 0.05}, {"density": 0.15}),
    "skip": ({},),
    "profiled": (),  # finds out while it runs what a search does beforehand
    PARO: (),  # its masks are calibrated first, see the preset
}
_OTHERS = ({"density": 0.1}, {"density": 0.3})
"""For methods that the table does not name, such as a user's own, if they have a density and need no training."""

SPARSE_VDIT = ("diagonal", "multi_diagonal", "vertical_stripe")
"""The patterns of Sparse-vDiT, beside dense and skip."""


def default_candidates(names: Iterable[str] | None = None) -> list[AttentionMethod]:
    """Return the candidates of some methods, or of all that are registered: a few densities of each.

    Methods with weights of their own that would have to be trained first have none.

    Args:
        names: Names of the methods; default: all.

    Raises:
        ValueError: There is no such method, or one that was asked for has no candidates by default.
    """
    found = [get_method(DENSE)]
    for name in list_methods() if names is None else names:
        cls = method_class(name)
        grid = _GRID.get(name)
        if grid is None:
            known = {field.name for field in fields(cls)}
            grid = _OTHERS if "density" in known and not cls.trained_for else ()
        if not grid and names is not None:
            raise ValueError(
                f"method {name!r} has no candidates by default; say which ones, such as {name}(field=value)"
            )
        found += [get_method(name, **each) for each in grid]
    return _distinct(found)


def sparse_vdit_candidates(density: float = 0.3) -> list[AttentionMethod]:
    """Return the five modes of Sparse-vDiT: dense, skip, diagonal, multi-diagonal, vertical stripe.

    Args:
        density: Fraction of pairs that each of the three patterns keeps, in (0, 1]; fixed in the paper, and not said.

    Source: Sparse-vDiT (arXiv 2506.03065), section on the offline search.
    """
    patterns = [get_method(name, density=density) for name in SPARSE_VDIT]
    return [get_method(DENSE), get_method("skip"), *patterns]


def make_candidates(wanted: Sequence[str | Mapping[str, Any] | AttentionMethod] | None) -> list[AttentionMethod]:
    """Return candidates from what a user names, dense first, each of them once.

    Args:
        wanted: Methods, what ``describe`` returns, names of methods (their default candidates), or text such as
            ``"draft(density=0.2, compensate=mean)"``; default: the default candidates of all methods.

    Raises:
        ValueError: There is no such method, a value is out of range, or the text makes no sense.
        TypeError: The method has no such field.
    """
    if wanted is None:
        return default_candidates()
    found = [get_method(DENSE)]
    for each in wanted:
        if isinstance(each, AttentionMethod):
            found.append(each)
        elif isinstance(each, Mapping):
            found.append(get_method(each["method"], **each["fields"]))
        elif "(" in each:
            name, values = read_call(each)
            found.append(get_method(name, **values))
        else:
            found += default_candidates([each.strip()])
    found = _distinct(found)
    if len(found) == 1:
        raise ValueError("there are no candidates; name some methods, such as draft, or leave candidates out for all")
    return found


def describe(method: AttentionMethod) -> dict[str, Any]:
    """Return name and fields of a candidate as JSON values, from which ``make_candidates`` makes it again.

    Args:
        method: The candidate.
    """
    return {"method": method.name, "fields": json.loads(json.dumps(asdict(method), default=repr))}


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Read a name with fields in brackets, where bare words are strings.

    Args:
        text: Such as ``"draft(density=0.2, compensate=mean)"``.

    Returns:
        The name, and the fields by name.

    Raises:
        ValueError: It is none.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise ValueError("expected NAME(field=value)")
        values = {word.arg: _value(word.value) for word in tree.keywords if word.arg is not None}
        if len(values) < len(tree.keywords):
            raise ValueError("its fields are not all named, each once")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {text!r}: {error}; write it like draft(density=0.2, compensate=mean)") from error
    return tree.func.id, values


def _value(node: ast.expr) -> Any:
    # a bare word is a string, but None, True and False are what they are
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _distinct(methods: list[AttentionMethod]) -> list[AttentionMethod]:
    return list(dict.fromkeys(methods))


def split_candidates(text: str) -> list[str]:
    """Split a list of methods at the commas that are not within brackets.

    Args:
        text: Such as ``"radial, draft(density=0.1, tile=(1, 8, 8))"``.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
