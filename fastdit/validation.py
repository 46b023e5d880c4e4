"""Validation of files that may come from anyone: pydantic models, and errors of one line that name the place."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, Strict, ValidationError

T = TypeVar("T")

MAX_NUMBER = 1e15
"""Largest number that is read."""
_OBJECT = ("dataclass_type", "dict_type", "model_type")


class Part(BaseModel):
    """A JSON object of a file: all of its entries are declared, and none is converted from another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _as_list(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


# what is not strict takes a list for a tuple; its items are strict all the same
Listed = Annotated[tuple[T, ...], Strict(False), FailFast(), BeforeValidator(_as_list)]
NonEmpty = Annotated[tuple[T, ...], Strict(False), FailFast(), Field(min_length=1), BeforeValidator(_as_list)]
Whole = Annotated[int, Field(ge=0, le=1_000_000)]
Size = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[
    float,
    Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False),
    AfterValidator(lambda value: float(f"{value:.6g}")),  # six digits are what files keep
]
Positive = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=10_000)]


def describe_error(error: ValidationError, place: str = "") -> str:
    """Describe the first fault that pydantic found, in one line: where it is, what is wrong, what was received.

    The text of a ``ValueError`` that a validator raised begins with the rest of the place, such as ``.heads[0]``.

    Args:
        error: The error.
        place: Where the validated value is; empty for the whole file.
    """
    fault = error.errors(include_url=False)[0]
    kind = fault["type"]
    for part in fault["loc"]:
        if part != "[key]":  # a key is shown as the value that was received
            place = join(place, part)
    if kind == "missing":
        text = " is missing"
    elif kind == "extra_forbidden":
        text = " is unknown; remove it"
    elif kind == "value_error":
        text = str(fault.get("ctx", {})["error"])
    else:
        expected = re.sub(r"^\w+ should", "must", fault["msg"]).partition(" after validation")[0]
        expected = {"tuple_type": "must be a list", **dict.fromkeys(_OBJECT, "must be an object")}.get(kind, expected)
        text = f" {expected}, got {shown(fault['input'])}"
    text = f"{place}{text}"
    return f"it{text}" if text.startswith(" ") else text.removeprefix(".")


def join(place: str, part: object) -> str:
    """Return the place of an item or entry, such as ``.heads[0]``.

    Args:
        place: The place of the list or object; empty for the whole.
        part: The index of the item, or the name of the entry.
    """
    return f"{place}[{part}]" if isinstance(part, int) else f"{place}.{shown(part)[1:-1]}"


def shown(value: Any) -> str:
    """Return a value as an error shows it, in a few words.

    Args:
        value: The value.
    """
    if isinstance(value, (list, tuple, dict)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:60]
